# frozen_string_literal: true

# What a program says to warmfork and hears from it: `require 'warmfork'`. Without a supervisor hooks are kept and never called, and
# all that needs one raises a Warmfork::Error. How a supervisor is spoken to is the session's affair.

# By another path, through a link.
return if defined?(Warmfork::VERSION)

module Warmfork
  VERSION = '0.1.0'

  # `code` says what went wrong: NO_SUPERVISOR (no supervisor to ask), BAD_OPTION, or what the supervisor answered.
  class Error < StandardError
    attr_reader :code

    def initialize(code, message)
      super(message)
      @code = code
    end
  end

  # How a fork ended: `code`, or the name of the `signal`; the other is nil.
  Exit = Struct.new(:pid, :code, :signal)

  # A checkpoint that stays: each `fork` of it costs a restore alone.
  class Generation
    attr_reader :number

    def initialize(number)
      @number = number
    end

    # The pid of a new fork, in which `Warmfork.checkpoint` returns, with the data as payload.
    def fork(data: nil)
      Warmfork.send(:ask_fork, data, @number).pid
    end

    # Gives the generation back; forks of it live on.
    def drop
      Warmfork.send(:session!).send_line(type: 'drop', generation: @number)
      nil
    end
  end
end

require_relative 'warmfork/hooks'
require_relative 'warmfork/inbox'
require_relative 'warmfork/identity'
require_relative 'warmfork/fork_call'
require_relative 'warmfork/requests'
require_relative 'warmfork/rack_counter'
require_relative 'warmfork/servers'
require_relative "warmfork/#{RUBY_ENGINE == 'jruby' ? 'jruby' : 'mri'}"
require_relative 'warmfork/session'

module Warmfork
  @hooks = Hooks.new
  @inbox = Inbox.new
  @ended = Inbox.new
  @requests = Requests.new

  class << self
    # What was given to this fork, nil where nothing was; a String in binary encoding where bytes were given.
    attr_reader :payload
    # Number of the generation that this process is a fork of; nil in a process that is none.
    attr_reader :generation

    # Has the block run in each fork, with its payload, before the program goes on there. Where it raises, or is not done in time,
    # the fork ends with status 70. `name` stands in the error's message, by default where the block was written.
    def on_fork(name = nil, &hook)
      @hooks.add(:on_fork, name, hook)
    end

    # Has the block run before each checkpoint, the last one first. Where it raises, or is not done in time, there is none.
    def before_checkpoint(name = nil, &hook)
      @hooks.add(:before, name, hook)
    end

    # Has the block run in the process that goes on after a checkpoint; it belongs to the `before_checkpoint` in front of it, and is
    # called after a refused checkpoint where that one was.
    def after_checkpoint(name = nil, &hook)
      @hooks.add(:after, name, hook)
    end

    # Says that the program is booted and warm.
    def ready
      return unless @session&.open?

      # On this thread, whose others may be busy: the agent's would wait for them at each file that it reads.
      Platform.prepare
      @session.send_line(%({"type":"ready"}\n))
      nil
    end

    # Forks this process. In the parent: the fork's pid, with which `Warmfork.wait` works (Process.wait does not: the fork is a child
    # of the supervisor). In the child: nil, or with a block the block is run and the process ends, as with Process.fork.
    # Other threads live on in the child.
    def fork(data: nil, &block)
      answer = ask_fork(data, nil)
      return Platform.run_child(payload, block) if answer == :child && block
      return nil if answer == :child

      ForkCall.wrappers(answer.pid)
      answer.pid
    end

    # Takes a checkpoint that stays, as a Generation. In forks of it: nil, or with a block the block is run and the process ends.
    def checkpoint(&block)
      answer = session!.call(type: 'keep')
      return Generation.new(answer.generation) unless answer == :child

      block && Platform.run_child(payload, block)
    end

    # Waits for the end of a fork that this process has asked for, or with nil of any: an Exit, or nil after the time-out (seconds).
    def wait(pid, timeout: nil)
      session!.wait(pid, timeout)
    end

    # Whether this process is a fork.
    def fork?
      !@generation.nil?
    end

    # To the user of the supervisor, or with `to` to a fork (its pid) that this process has asked for, or to the `:parent` that
    # asked for this one. Strings in binary encoding go as bytes, everything else as JSON.
    def send_message(data, to: nil)
      session!.send_line({ type: 'message', data: Identity.encode(data) }.merge(to ? { to: to } : {}))
      nil
    end

    # Has the block called with each message, and with its sender (a pid, 'parent', or nil for the supervisor's user), on a thread
    # of its own. Messages that came before the first block wait for it.
    def on_message(&handler)
      @inbox.add(handler)
    end

    # Has the block called with the Exit of each fork that this process has asked for, on a thread of its own. `wait` gives it too.
    def on_child_exit(&handler)
      @ended.add(handler)
    end

    # A Rack application around this one, whose requests are counted. For a server that the agent does not know: what Puma and WEBrick
    # serve, and what Rack::Builder builds (config.ru), is counted anyway, and never twice.
    def count_requests(app)
      raise ArgumentError, 'no application: it has no `call`' unless app.respond_to?(:call)

      RackCounter.new(app)
    end

    # Counts the block as a request, where no server is known. Before a refork it waits until it is over. In a fork a block that
    # waited does not run: then it raises an exception. `name` is for messages. With `socket`, that of the connection, also a request
    # that had been read and had not begun is seen in a fork.
    def count_request(name = nil, socket: nil, &block)
      raise ArgumentError, 'no block given' unless block

      @requests.count(name, socket, &block)
    end

    # Says that no others may be forked from this process from now on: it is never reforked. It cannot be taken back. `fork` of the
    # process itself still works.
    def no_longer_fork_safe!(reason = nil)
      @unsafe = reason.to_s
      @session&.send_line(Session.unsafe(@unsafe))
      nil
    end

    # For the agent's own parts.
    attr_reader :requests

    # Whether there is a supervisor. Waits for its word where it has not said it yet.
    def connected?
      @session ? @session.welcome? : false
    end

    private

    attr_reader :session, :unsafe

    def session!
      raise Error.new('NO_SUPERVISOR', 'no supervisor of warmfork is connected') unless @session&.open?

      @session
    end

    def ask_fork(data, generation)
      request = { type: 'fork' }
      request[:generation] = generation if generation
      request[:data] = Identity.encode(data) unless data.nil?
      session!.call(request)
    end

    # The session that this process has from now on.
    def connect
      @session = Session.connect(ENV['WARMFORK_SOCKET'], @hooks, @inbox, @ended)
      return unless @session

      @session.send_line(Session.unsafe(@unsafe)) if @unsafe
      Platform.connected
    end

    # In a child of a real fork: the connection is the parent's.
    def reconnect
      old = @session or return
      @session = nil
      @generation = @payload = nil
      @inbox.renew
      @ended.renew
      renew_requests
      old.abandon
      connect
    end

    # Those until now are the source's. What it holds back is let go of by who holds it.
    def renew_requests
      @requests.over!
      @requests = Requests.new(blind: @requests.blind)
    end

    def become(message)
      renew_requests
      @generation = message['generation']
      @payload = message.key?('data') ? Identity.decode(message['data']) : nil
    end
  end

  Platform.install
  if ENV['WARMFORK_SOCKET']
    connect
    Servers.install if @session
  end
end
