# frozen_string_literal: true

require 'socket.so'

module Warmfork
  # What is particular to MRI: a connection whose read can hold Ruby's lock, real forks, pids that Ruby remembers. It knows no protocol.
  module Platform
    RUNTIME = 'ruby'
    RUNTIME_VERSION = RUBY_VERSION

    # Kernel#syscall keeps Ruby's lock for as long as the call takes, which no method of IO does.
    SYSTEM_CALLS = {
      /\Ax86_64-linux/ => { read: 0, write: 1, close: 3, getpid: 39, chdir: 80, pipe2: 293 },
      /\A(?:aarch64|arm64|riscv64)-linux/ => { read: 63, write: 64, close: 57, getpid: 172, chdir: 49, pipe2: 59 },
    }.find { |platform, _| platform.match?(RUBY_PLATFORM) }&.last
    SYSTEM_CALLS_WORK = SYSTEM_CALLS && Kernel.respond_to?(:syscall, true)

    class << self
      def install
        $warmfork_pid = nil
        real = Process.method(:_fork)
        real = real.super_method while real.super_method
        ForkCall.install { real.call.tap { |pid| Platform.after_real_fork if pid.zero? } }
        Process.singleton_class.prepend(Daemon)
      end

      def connected; end

      def after_real_fork
        $warmfork_pid = system_call(:getpid) if $warmfork_pid
        Warmfork.send(:reconnect)
      rescue StandardError
        nil
      end

      # What a fork needs is loaded before the checkpoint: each would load it again.
      def prepare
        Identity.json
        return unless SYSTEM_CALLS_WORK && RUBY_VERSION < '3.3'

        require_relative 'mri_pid' unless defined?(RememberedPid)
        RememberedPid.find
      end

      # Without a thread switch for some 0.7 s: a thread of priority 3 has eight times the usual slice of 100 ms. Hooks that wait,
      # for a server or another thread, let others run.
      def uninterrupted
        before = Thread.list
        Thread.current.priority = 3
        yield
      ensure
        Thread.current.priority = 0
        # A new thread takes its priority from the one that starts it.
        (Thread.list - before).each { |thread| thread.priority = 0 if thread.priority == 3 }
      end

      # Whether a connection has another side.
      def peer?(socket)
        return socket.recv_nonblock(1, Socket::MSG_PEEK, exception: false) != '' if socket.is_a?(UNIXSocket)

        # SO_DOMAIN: in the place of a TCP connection is a Unix one that has ended.
        socket.getsockopt(:SOCKET, 39).int == socket.local_address.afamily && !socket.getpeername.nil?
      end

      def renew_random(_seed); end

      def random_integer(_seed)
        Random.new_seed
      end

      def renew_ids(message)
        RememberedPid.renew if defined?(RememberedPid)
        remember_pid
        remember_thread_ids(message['threads'] || {})
      end

      # Dir.chdir lets other threads run, and refuses where another one is in its block.
      def chdir(path)
        SYSTEM_CALLS_WORK ? system_call(:chdir, path) : Dir.chdir(path)
      end

      # As Process.fork ends its block: exit handlers run, what encloses the call does not. Only Ruby's main thread can do so.
      def run_child(payload, block)
        begin
          Hooks.yield_to(block, payload)
        rescue Exception => e # rubocop:disable Lint/RescueException
          error = e
        end
        stop(error) if Thread.current == Thread.main
        raise error if error

        exit(true)
      end

      def system_call(name, *arguments)
        verbose, $VERBOSE = $VERBOSE, nil
        Kernel.syscall(SYSTEM_CALLS.fetch(name), *arguments)
      ensure
        $VERBOSE = verbose
      end

      private

      # From 3.3 on Ruby remembers its pid, in a variable that nothing of Ruby's own changes but a real fork.
      def remember_pid
        return unless SYSTEM_CALLS_WORK && Process.pid != (pid = system_call(:getpid))

        first = $warmfork_pid.nil?
        $warmfork_pid = pid
        return unless first

        ForkCall.redefine { Process.define_singleton_method(:pid) { $warmfork_pid } }
        alias $$ $warmfork_pid
      end

      def remember_thread_ids(ids)
        return unless Thread.method_defined?(:native_thread_id)

        Thread.list.each do |thread|
          id = ids[thread.native_thread_id.to_s] or next
          thread.instance_variable_set(:@warmfork_native_thread_id, id)
        end
        Thread.prepend(NativeThreadId) unless Thread.include?(NativeThreadId)
      end

      def stop(error)
        require 'fiddle'
        function = lambda do |name, type|
          Fiddle::Function.new(Fiddle::Handle::DEFAULT[name], [type], Fiddle::TYPE_VOID, need_gvl: true)
        end
        state = 0
        if error
          function.call('rb_set_errinfo', Fiddle::TYPE_UINTPTR_T).call(Fiddle.dlwrap(error))
          # TAG_RAISE: Ruby prints it, or takes the status of an `exit`.
          state = 6
        end
        function.call('ruby_stop', Fiddle::TYPE_INT).call(state)
      rescue LoadError, Fiddle::DLError
        nil
      end
    end

    # Has Ruby's main thread stand still while hooks wait for something: in a signal's handler, which is the one thing that can be put on
    # a thread from outside. Other threads go on when a hook waits. SIGURG says nothing to anybody by default, and is only noted here, not sent.
    class Gate
      SIGNAL = :URG
      private_constant :SIGNAL

      # Gives the names of the threads that go on while the agent reads: without Kernel#syscall all. `idle`: those that wait for us anyway.
      def close(idle)
        return (Thread.list - idle).map { |thread| thread.name || thread.inspect } unless SYSTEM_CALLS_WORK
        return [] if idle.include?(Thread.main)

        opened = @opened = Queue.new
        @previous = Signal.trap(SIGNAL) { opened.pop }
        Process.kill(SIGNAL, Platform.system_call(:getpid))
        []
      end

      def open
        return unless @opened

        Signal.trap(SIGNAL, @previous || 'IGNORE')
        @opened.close
        @opened = nil
      end
    end

    # Process.daemon forks below Process._fork, and only the thread that calls it lives on.
    module Daemon
      def daemon(...)
        super.tap { Platform.after_real_fork }
      end
    end

    # Ruby asks for a thread's id once.
    module NativeThreadId
      def native_thread_id
        @warmfork_native_thread_id || super
      end
    end

    # A connection to a supervisor.
    class Wire
      CHUNK_BYTES = 65_536
      GET_FLAGS = 3
      SET_FLAGS = 4
      private_constant :CHUNK_BYTES, :GET_FLAGS, :SET_FLAGS

      def initialize(path)
        @io = UNIXSocket.new(path)
        # The program may close the descriptor and have another file there: that one must not be closed with this object.
        @io.autoclose = false
        @io.fcntl(SET_FLAGS, @io.fcntl(GET_FLAGS) & ~IO::NONBLOCK)
        @fd = @io.fileno
        remember
      end

      attr_reader :fd

      # The descriptor as it is now is ours: a fork has another one in its place.
      def remember
        @file = file
      end

      def ours?
        @file == file
      rescue SystemCallError, IOError
        false
      end

      # Whether another one is in its place.
      def replaced?
        @file != file
      rescue SystemCallError, IOError
        false
      end

      def write(line)
        line = line.byteslice(@io.syswrite(line)..) until line.empty?
      end

      # Some bytes; raises EOFError at the end.
      def read
        @io.sysread(CHUNK_BYTES)
      end

      # As `write`, and Ruby's lock is kept.
      def write_holding(line)
        return write(line) unless SYSTEM_CALLS_WORK

        line = line.byteslice(retried { Platform.system_call(:write, fd, line.b, line.bytesize) }..) until line.empty?
      end

      # As `read`, and no other thread runs before the bytes are there.
      def read_holding
        return read unless SYSTEM_CALLS_WORK

        # `syscall` refuses a buffer with a NUL in it.
        buffer = '.'.b * CHUNK_BYTES
        count = retried { Platform.system_call(:read, fd, buffer, CHUNK_BYTES) }
        raise EOFError, 'end of the connection' if count.zero?

        # Not a slice: Ruby believes to know what is in the buffer.
        buffer.unpack1("a#{count}")
      end

      # Has a `read` under way come back. It ends with its thread anyway.
      def shutdown; end

      def close
        return unless ours?

        @io.autoclose = true
        @io.close
      rescue SystemCallError, IOError
        nil
      end

      # After another thread has closed the descriptor, or the object, which it has for one of the program's: that leaves the descriptor.
      def give_up
        IO.for_fd(@fd).close if @io.closed? && ours?
      rescue SystemCallError, IOError
        nil
      end

      private

      def file
        stat = IO.for_fd(@fd, autoclose: false).stat
        [stat.dev, stat.ino]
      end

      def retried
        yield
      rescue Errno::EINTR
        retry
      rescue Errno::EAGAIN
        # The program has made it non-blocking: 1 ms with the lock held is better than other threads running.
        @io.fcntl(SET_FLAGS, @io.fcntl(GET_FLAGS) & ~IO::NONBLOCK)
        retry
      end
    end
  end
end
