# frozen_string_literal: true

module Warmfork
  # The requests that this process serves: how many were answered, which are in hand, and holding back those that come. It knows threads
  # and fibers, and no server: `servers` says where requests begin and end. docs/agent-protocol.md has the rules.
  class Requests
    # It was held back in the source, which serves it. This is a fork, where nothing may come of it.
    class Dropped < StandardError
      def initialize
        super('the request is the source\'s of this fork, which answers it')
      end
    end

    # Between two messages.
    REPORT_SECONDS = 0.1
    # How often is looked whether requests in hand have ended.
    LOOK_SECONDS = 0.002
    # What has been read and has not begun is unseen where no connection is known, and would run in a fork. So nothing must have come to
    # the gate for so long, or the gate have been closed for so long. Under load on a busy machine 5 ms missed one in three.
    QUIET_SECONDS = 0.02
    MAX_QUIET_SECONDS = 0.1
    MAX_PATH = 200
    # What a fiber is about: what is counted at two places is one.
    CURRENT = :warmfork_request
    private_constant :REPORT_SECONDS, :LOOK_SECONDS, :QUIET_SECONDS, :MAX_QUIET_SECONDS, :MAX_PATH, :CURRENT

    # One in hand.
    class Request
      attr_reader :owner
      attr_accessor :since

      def initialize(owner, name)
        @owner = owner
        @name = name
      end

      # Its answer is sent, or none will be.
      def finish(answered: true)
        @owner.finish(self, answered)
      end

      def to_s
        name = @name.respond_to?(:call) ? @name.call : @name
        name.to_s.strip.empty? ? 'a request without a name' : Hooks::Failure.text(name)[0, MAX_PATH]
      end
    end

    class << self
      # That of this fiber, in hand; nil where there is none.
      def current
        request = Thread.current[CURRENT]
        request if request&.owner&.in_hand?(request)
      end

      def current=(request)
        Thread.current[CURRENT] = request
      end

      # Headers are sent: an event stream may never end. It is not in hand from now on, and not counted.
      def note_type(type)
        current&.finish(answered: false) if type.to_s.downcase.start_with?('text/event-stream')
      end
    end

    # `blind`: whether a request has begun whose connection was not known.
    def initialize(blind: false)
      @blind = blind
      @lock = Mutex.new
      # By age.
      @in_hand = {}
      @total = @said = 0
      @ms = 0.0
      @held = 0
    end

    attr_reader :held, :blind

    # Waits where requests are held back; nil within another one. Raises Dropped. `name`: of the request, or a block's that gives it.
    # `socket`: of its connection, where that is known.
    def begin(name = nil, socket = nil)
      return nil if Requests.current
      raise Dropped if of_source?(socket)

      @blind = true if socket.nil?
      request = Request.new(self, name)
      while (gate = admit(request))
        begin
          gate.pop
        ensure
          @lock.synchronize { @held -= 1 }
        end
        raise Dropped if @over
      end
      Requests.current = request
    end

    def finish(request, answered)
      now = Requests.now
      owed = @lock.synchronize do
        next unless @in_hand.delete(request) && answered

        @total += 1
        @ms += (now - request.since) * 1000
        next if @reporting

        @reporting = true
      end
      report if owed
    end

    def in_hand?(request)
      @in_hand.key?(request)
    end

    # The block runs as a request.
    def count(name = nil, socket = nil)
      request = self.begin(name, socket)
      begin
        yield
      ensure
        request&.finish
      end
    end

    # Holds back what begins, for at most a quarter of the time at once. Gives what is in hand yet, where that does not end. The block
    # says whether it waits in vain.
    def until_none_in_hand(timeout_ms, &in_vain)
      deadline = Requests.now + (timeout_ms / 1000.0)
      hold = timeout_ms / 4000.0
      loop do
        # One that takes long is not to hold up all that come after it.
        if wait(deadline, in_vain) { age <= hold }
          hold_back
          return wait_for_quiet if wait([deadline, Requests.now + hold].min, in_vain) { @in_hand.empty? }
        end
        what = describe
        let_go
        return "#{what}; the program has asked for a fork of itself meanwhile" if in_vain.call
        return what if Requests.now >= deadline
      end
    end

    def let_go
      gate = @lock.synchronize do
        @gate.tap { @gate = nil }
      end
      gate&.close
    end

    # This process is a fork: those here are the source's.
    def over!
      @over = true
    end

    def self.now
      Process.clock_gettime(Process::CLOCK_MONOTONIC)
    end

    private

    # Gives the gate where it is closed.
    def admit(request)
      @lock.synchronize do
        if @gate
          @held += 1
          next @gate
        end

        request.since = Requests.now
        @in_hand[request] = true
        nil
      end
    end

    def hold_back
      @lock.synchronize { @gate = Queue.new }
    end

    def wait(deadline, in_vain)
      until yield
        return false if Requests.now >= deadline || in_vain.call

        sleep(LOOK_SECONDS)
      end
      true
    end

    def wait_for_quiet
      deadline = Requests.now + MAX_QUIET_SECONDS
      seen = nil
      while @blind && seen != @held && Requests.now < deadline
        seen = @held
        sleep(QUIET_SECONDS)
      end
    end

    def oldest
      @lock.synchronize { @in_hand.first&.first }
    end

    def age
      request = oldest
      request ? Requests.now - request.since : 0.0
    end

    def describe
      request = oldest or return 'requests came faster than they could be held back'
      count = @in_hand.size
      many = count == 1 ? '1 request is in hand, for' : "#{count} requests are in hand, the oldest for"
      "#{many} #{((Requests.now - request.since) * 1000).round} ms: #{request}"
    end

    # In a fork, whether the connection is one that its source goes on with: what was read of it before is the source's.
    def of_source?(socket)
      return false if socket.nil? || !Warmfork.fork?

      # In the place of a connection a fork has something else, or the end of it.
      io = socket.respond_to?(:to_io) ? socket.to_io : socket
      return false unless io.is_a?(BasicSocket)

      io.closed? || !Platform.peer?(io)
    rescue SystemCallError, IOError
      true
    end

    # A thread tells of the counts which lives as long as they change: the agent's own waits in the kernel.
    def report
      thread = Thread.new do
        loop do
          say
          sleep(REPORT_SECONDS)
          break if @lock.synchronize { @reporting = false if @over || @said == @total } == false
        end
      end
      thread.name = 'warmfork requests'
      thread.report_on_exception = false
      thread.thread_variable_set(:fork_safe, true)
      # It has the group of who serves, which a server can wait for.
      ThreadGroup::Default.add(thread) unless ThreadGroup::Default.enclosed?
    rescue ThreadError
      # The interpreter ends.
      say
    end

    def say
      total, ms = @lock.synchronize { [@said = @total, @ms] }
      Warmfork.send(:session)&.send_line(%({"type":"requests","total":#{total},"ms":#{ms.round(3)}}\n)) unless @over
    end
  end
end
