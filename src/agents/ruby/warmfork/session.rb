# frozen_string_literal: true

module Warmfork
  # One connection to a supervisor, and the thread that reads it: docs/agent-protocol.md, seen from the agent. Hooks run on this thread.
  class Session
    PROTOCOL = 1
    MAX_LINE_TO_SUPERVISOR = 8 << 20
    MAX_LINE_FROM_SUPERVISOR = 16 << 20
    FAILED_STATUS = 70
    WELCOME_TIMEOUT_SECONDS = 5
    # Of ends of forks that nobody has waited for.
    MAX_EXITS = 10_000
    MAX_REASON = 1_000
    # What ends a connection and not the program.
    LOST = [SystemCallError, IOError].freeze

    Answer = Struct.new(:pid, :generation)
    Call = Struct.new(:kind, :queue, :thread)
    private_constant :Answer, :Call

    # nil where nobody listens.
    def self.connect(path, hooks, inbox, ended)
      new(Platform::Wire.new(path), hooks, inbox, ended).start
    rescue *LOST, ArgumentError
      # The last is said of a path that is too long.
      nil
    end

    # A line.
    def self.unsafe(reason)
      more = reason.empty? ? '' : %(,"reason":#{Identity.json.generate(Hooks::Failure.text(reason)[0, MAX_REASON])})
      %({"type":"unsafe"#{more}}\n)
    end

    def initialize(wire, hooks, inbox, ended)
      @wire = wire
      @hooks = hooks
      @inbox = inbox
      # The ends of forks.
      @ended = ended
      @buffer = String.new(encoding: Encoding::BINARY)
      # Held while it is written, and from `parked` to the answer.
      @writing = Mutex.new
      @state = Mutex.new
      @changed = ConditionVariable.new
      @calls = {}
      @sequence = 0
      @exits = {}
      # Grows with each fork that this memory has gone through.
      @epoch = 0
    end

    def start
      @wire.write(
        %({"type":"hello","protocol":#{PROTOCOL},"agent":"#{Platform::RUNTIME}/#{VERSION}","runtime":"#{Platform::RUNTIME}",) +
        %("version":"#{Platform::RUNTIME_VERSION}","pid":#{Process.pid},"fd":#{@wire.fd},"counts":true}\n),
      )
      @thread = Thread.new { run }
      @thread.name = 'warmfork'
      @thread.report_on_exception = false
      # Puma and others name the threads that a fork would lose: this one is made anew.
      @thread.thread_variable_set(:fork_safe, true)
      self
    end

    def open?
      !@closed
    end

    def welcome?
      @state.synchronize do
        deadline = now + WELCOME_TIMEOUT_SECONDS
        @changed.wait(@state, 0.5) until @welcome || @closed || now > deadline
        @welcome && !@closed ? true : false
      end
    end

    # Sends a message; not at all where a checkpoint came in between, and this is a fork: then it was the source's.
    def send_line(message)
      epoch = @epoch
      line = line_of(message)
      @writing.synchronize { write(line) if epoch == @epoch }
      epoch == @epoch
    rescue *LOST => e
      lose(e.message)
    end

    # Sends a `fork` or `keep` and waits: an Answer, or :child in the fork that answers the call. Raises a Warmfork::Error.
    def call(request)
      raise Error.new('BAD_OPTION', 'a hook cannot ask for a fork or a checkpoint') if Thread.current == @thread

      epoch = @epoch
      call = Call.new(request[:type], Queue.new, Thread.current)
      id = @state.synchronize do
        raise_lost if @closed
        @sequence += 1
        @calls[@sequence] = call
        @sequence
      end
      begin
        sleep unless send_line(request.merge(id: id)) || @epoch == epoch
        answer = call.queue.pop
      ensure
        @state.synchronize { @calls.delete(id) }
      end
      raise answer if answer.is_a?(Exception)

      answer
    end

    # Of any of them where the pid is nil.
    def wait(pid, timeout)
      deadline = timeout && (now + timeout)
      @state.synchronize do
        until (ended = @exits.delete(pid || @exits.keys.first))
          raise_lost if @closed
          left = deadline && (deadline - now)
          return nil if left && left <= 0

          @changed.wait(@state, left)
        end
        ended
      end
    end

    # Whether that process is a fork that was asked for from here.
    def child?(pid)
      @state.synchronize { @children&.include?(pid) || @exits.key?(pid) }
    end

    def children
      @state.synchronize { (@children || []) | @exits.keys }
    end

    # In a child of a real fork: the descriptor is a copy, and the thread is gone.
    def abandon
      @closed = true
      @wire.close
    end

    # Has the reading thread end, so that the process can.
    def shutdown
      @wire.shutdown if @wire.ours?
    end

    private

    def run
      loop do
        line = next_line { @wire.read }
        break if line.nil?

        message = parse(line)
        break if message.nil? || obey(message) == :end
      end
      lose('the connection was closed')
    rescue EOFError, SystemCallError => e
      lose(e.message)
    rescue IOError => e
      # The program is closing the descriptor, or its object.
      lose(e.message, close: false)
    rescue Hooks::Failure => e
      # Only a fork gets here.
      fail_fork(e)
    rescue StandardError => e
      lose("#{e.message} (#{e.class})")
    ensure
      lose('its thread was ended') unless @closed
    end

    # nil where the descriptor is not ours any more.
    def next_line
      searched = 0
      until (at = @buffer.index("\n", searched))
        return nil if @buffer.bytesize > MAX_LINE_FROM_SUPERVISOR

        searched = @buffer.bytesize
        chunk = yield
        return nil if chunk.nil?

        @buffer << chunk
      end
      @buffer.slice!(0..at)
    end

    # nil for what is no message.
    def parse(line)
      # Loading json is left until Bundler has chosen a version.
      return { 'type' => 'welcome' } if line.start_with?('{"type":"welcome"')
      return { 'type' => 'goodbye' } if line.start_with?('{"type":"goodbye"')

      message = Identity.json.parse(line.dup.force_encoding(Encoding::UTF_8), max_nesting: false)
      message if message.is_a?(Hash)
    rescue JSON::ParserError
      nil
    end

    def obey(message)
      return :end unless @wire.ours?

      case message['type']
      when 'welcome' then @state.synchronize { change { @welcome = true } }
      when 'goodbye' then return :end
      when 'checkpoint' then return checkpoint(message)
      when 'forkResult', 'keepResult' then settle(message)
      when 'childExit' then child_exit(message)
      when 'message' then @inbox.deliver(Identity.decode(message['data'] || {}), message['from'])
      end
      nil
    end

    # Gives :end where the connection ended in it.
    def checkpoint(message)
      timeout_ms = message['timeoutMs'] || 10_000
      began = now
      begin
        @hooks.step('warmfork: prepare') { Platform.prepare }
        @resting = rest(timeout_ms) if message['reason'] == 'refork'
        @hooks.before(@resting ? [timeout_ms - ((now - began) * 1000).round, 1].max : timeout_ms)
      rescue Hooks::Failure => e
        return :end if @closed

        let_go
        send_line(type: 'refused', id: message['id'], error: e.details)
        return nil
      end
      # A hook has forked, and this is the child, which has a connection of its own.
      return :end if @closed

      Platform.uninterrupted { park(message['id'], timeout_ms) }
    ensure
      let_go
    end

    # For a refork: what is in hand would go on in each fork. Gives what holds back the requests that come.
    def rest(timeout_ms)
      unsafe = Warmfork.send(:unsafe)
      if unsafe
        reason = unsafe.empty? ? 'no reason was given' : unsafe
        raise Hooks::Failure.new({ code: 'UNSAFE', message: Hooks::Failure.text("the program is no longer fork-safe: #{reason}") })
      end
      requests = Warmfork.requests
      busy = requests.until_none_in_hand(timeout_ms) { @calls.any? }
      raise Hooks::Failure.new({ code: 'BUSY', message: busy }) if busy

      requests
    end

    def let_go
      resting, @resting = @resting, nil
      resting&.let_go
    end

    def park(id, timeout_ms)
      gate = Platform::Gate.new
      answer, later = @writing.synchronize { exchange(id, gate) }
      opener = open_later(gate, answer&.fetch('timeoutMs', nil) || timeout_ms)
      return become_fork(answer) if answer && answer['type'] == 'forked'

      failure = @hooks.after(timeout_ms)
      return :end if answer.nil?

      send_line({ type: 'running' }.merge(failure ? { error: failure.details } : {}))
      later.each { |message| return :end if obey(message) == :end }
      nil
    ensure
      gate&.open
      opener&.kill
    end

    # From the word that it is parked to the answer, nil where there is none. What is read meanwhile is the source's, and comes after it.
    def exchange(id, gate)
      later = []
      words = { type: 'parked', id: id }
      threads = gate.close(idle_threads)
      words[:threads] = threads.map { |name| Hooks::Failure.text(name) } unless threads.empty?
      words[:held] = @resting.held if @resting&.held&.positive?
      line = line_of(words)
      raise IOError, 'the descriptor is another file' unless @wire.ours?

      @replaced = false
      @wire.write_holding(line)
      loop do
        line = next_line { read_parked }
        answer = line && parse(line)
        @epoch += 1 if answer && answer['type'] == 'forked'
        break if answer.nil?
        return [answer, later] if %w[resumed forked].include?(answer['type'])

        later << answer
      end
      unanswered
    rescue *LOST
      unanswered
    end

    # A fork that nobody tells who it is must not go on as its source.
    def unanswered
      exit!(FAILED_STATUS) if @replaced || @wire.replaced?

      nil
    end

    # A hook that waits for what a thread at the gate holds would wait for ever: after half of the time they go on.
    def open_later(gate, timeout_ms)
      return unless @hooks.any?(:after) || @hooks.any?(:on_fork)

      Thread.new do
        sleep(timeout_ms / 2000.0)
        gate.open
      end
    end

    def read_parked
      raise IOError, 'the descriptor is another file' unless @wire.ours?

      chunk = @wire.read_holding
      unless @wire.ours?
        # A fork: what was read of the source's connection is not for it.
        @replaced = true
        @buffer.clear
        @wire.remember
      end
      chunk
    end

    def become_fork(message)
      Warmfork.send(:become, message)
      @inbox.renew
      @ended.renew
      mine, @exits, @children = take_call(message['call']), {}, nil
      watching(message['timeoutMs'] || 10_000) do
        Identity.take_over(message, @hooks)
        @hooks.step('Process._fork') { ForkCall.wrappers(0) }
        @hooks.on_fork(Warmfork.payload)
      end
      # A hook has forked: the child of it has gone another way.
      return :end if @closed

      send_line(type: 'running')
      mine&.queue&.push(:child)
      nil
    end

    # The call that this fork answers. One that was made of a kept generation is not known here, since it came after the checkpoint:
    # it is answered by the call that asked for the generation. All others are the source's, and wait for ever.
    def take_call(id)
      @state.synchronize do
        calls = @calls
        @calls = {}
        next nil if id.nil?

        calls[id] || calls.values.find { |call| call.kind == 'keep' }
      end
    end

    # Ends the fork where the block takes longer.
    def watching(timeout_ms)
      watch = Thread.new do
        sleep(timeout_ms / 1000.0)
        fail_fork(Hooks::Failure.new(hook: @hooks.running, message: "it was not done within #{timeout_ms} ms"))
      end
      yield
    ensure
      watch&.kill
    end

    # Exit handlers are the program's, which has not begun here.
    def fail_fork(error)
      exit!(error.cause.status) if error.cause.is_a?(SystemExit)

      send_line(type: 'failed', error: error.details)
    ensure
      exit!(FAILED_STATUS)
    end

    def settle(message)
      call = @state.synchronize do
        # Before its caller knows: its end can be told at once.
        (@children ||= []) << message['pid'] if message['pid']
        @calls[message['id']]
      end
      error = message['error']
      call&.queue&.push(
        error ? Error.new(error['code'] || 'CHECKPOINT_FAILED', error['message'].to_s) : Answer.new(*message.values_at('pid', 'generation')),
      )
    end

    def child_exit(message)
      ended = Exit.new(*message.values_at('pid', 'code', 'signal'))
      @state.synchronize do
        change do
          @children&.delete(ended.pid)
          @exits[ended.pid] = ended
          @exits.shift if @exits.size > MAX_EXITS
        end
      end
      @ended.deliver(ended, nil)
    end

    # Of these it is known that they go on only after the answer.
    def idle_threads
      [Thread.current, *@inbox.idle_thread, *@ended.idle_thread, *@state.synchronize { @calls.values.map(&:thread) }]
    end

    def lose(message, close: true)
      calls = @state.synchronize do
        next [] if @closed

        change { @closed = true }
        @calls.values
      end
      @lost = message
      calls.each { |call| call.queue.push(Error.new('NO_SUPERVISOR', "the supervisor is gone: #{message}")) }
      close ? @wire.close : @wire.give_up
      nil
    end

    def raise_lost
      raise Error.new('NO_SUPERVISOR', "the supervisor is gone: #{@lost || 'the connection was closed'}")
    end

    def change
      yield.tap { @changed.broadcast }
    end

    def write(line)
      raise IOError, 'the descriptor is another file' unless @wire.ours?

      @wire.write(line)
    end

    # A String is a line already.
    def line_of(message)
      return message if message.is_a?(String)

      line = "#{Identity.json.generate(message, max_nesting: 0)}\n"
      return line if line.bytesize <= MAX_LINE_TO_SUPERVISOR

      raise Error.new('BAD_OPTION', "a message has at most #{MAX_LINE_TO_SUPERVISOR} bytes, and this one #{line.bytesize}")
    end

    def now
      Process.clock_gettime(Process::CLOCK_MONOTONIC)
    end
  end
end
