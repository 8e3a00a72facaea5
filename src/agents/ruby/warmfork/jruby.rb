# frozen_string_literal: true

require 'jruby'

module Warmfork
  # What is particular to JRuby: a connection by read(2) and write(2), `fork` where there was none, Java's random generators. It knows
  # no protocol.
  module Platform
    RUNTIME = 'jruby'
    RUNTIME_VERSION = JRUBY_VERSION
    POSIX = JRuby.runtime.getPosix

    class << self
      def install
        $warmfork_pid = nil
        ForkCall.install { raise NotImplementedError, 'fork() function is unimplemented on this machine' }
        # Registered before all others, and so run after them: JRuby waits for its threads, and this one waits in the kernel.
        at_exit { Warmfork.send(:session)&.shutdown }
      end

      # There is a supervisor: from now on a program can fork.
      def connected
        Process.singleton_class.prepend(Forks)
        Process.singleton_class.prepend(Waits)
        Kernel.singleton_class.prepend(Forks)
        Kernel.module_eval do
          def fork(&block)
            Process.fork(&block)
          end
          private :fork
        end
      end

      # What a fork needs is loaded, and looked for, before the checkpoint: each would do it again.
      def prepare
        Identity.json
        require_relative 'java_random' unless defined?(JavaRandom)
        require_relative 'jruby_gate' unless defined?(Gate)
        require_relative 'jruby_poll' unless defined?(Poll)
        JavaRandom.prepare
        Gate.prepare
      end

      def uninterrupted
        yield
      end

      # Whether a connection has another side. Java remembers it where there is none any more.
      def peer?(socket)
        return true unless defined?(Poll)

        Poll.alone?(socket.fileno) ? false : true
      end

      def renew_random(seed)
        require_relative 'java_random' unless defined?(JavaRandom)
        JavaRandom.renew(seed)
      end

      def random_integer(seed)
        random_bytes(32, seed).unpack1('H*').to_i(16)
      end

      # From the kernel, or where there is no /dev (chroot) from the fork's own seed.
      def random_bytes(count, seed)
        File.binread('/dev/urandom', count)
      rescue SystemCallError
        digest = java.security.MessageDigest.getInstance('SHA-512')
        bytes = ''.b
        while bytes.bytesize < count
          @drawn = (@drawn || 0) + 1
          bytes << String.from_java_bytes(digest.digest("#{@drawn} #{seed}".to_java_bytes))
        end
        bytes[0, count]
      end

      # `$$` and Java ask for it once.
      def renew_ids(_message)
        first = $warmfork_pid.nil?
        $warmfork_pid = POSIX.getpid
        alias $$ $warmfork_pid if first
        JavaRandom.remember_pid($warmfork_pid)
      end

      def chdir(path)
        Dir.chdir(path)
      end

      # As Process.fork ends its block: exit handlers run, what encloses the call does not.
      def run_child(payload, block)
        status = status_of { Hooks.yield_to(block, payload) }
        status = status_of(status) { JRuby.runtime.tearDown(true) }
        java.lang.System.exit(status)
      end

      private

      def status_of(status = 0)
        yield
        status
      rescue SystemExit => e
        e.status
      rescue Exception => e # rubocop:disable Lint/RescueException
        warn e.full_message(highlight: false)
        1
      end
    end

    # In front of methods that only raise NotImplementedError.
    module Forks
      def fork(&block)
        return super unless Warmfork.connected?

        Warmfork.fork(&block)
      end

      # Looked at by those that can do without.
      def respond_to_missing?(name, all = false)
        name == :fork || super
      end
    end

    # A fork is the supervisor's child, which waitpid(2) does not know.
    module Waits
      def wait(pid = -1, flags = 0)
        session = Warmfork.send(:session)
        return super unless session && (pid == -1 ? session.children.any? : session.child?(pid))

        ended = Warmfork.wait(pid == -1 ? nil : pid, timeout: (flags.to_i & Process::WNOHANG).zero? ? nil : 0)
        return nil if ended.nil?

        status = ended.code ? ended.code << 8 : Signal.list.fetch(ended.signal.delete_prefix('SIG'), 0)
        status = org.jruby.RubyProcess::RubyStatus.newProcessStatus(JRuby.runtime, status, ended.pid)
        JRuby.runtime.getCurrentContext.setLastExitStatus(status)
        ended.pid
      end

      def wait2(pid = -1, flags = 0)
        found = wait(pid, flags)
        found && [found, $?]
      end

      def waitall
        mine = []
        mine << wait2 while Warmfork.send(:session)&.children&.any?
        mine + super
      end

      def detach(pid)
        return super unless Warmfork.send(:session)&.child?(pid)

        Thread.new { wait2(pid)&.last }.tap { |thread| thread.define_singleton_method(:pid) { pid } }
      end

      def waitpid(pid = -1, flags = 0)
        wait(pid, flags)
      end

      def waitpid2(pid = -1, flags = 0)
        wait2(pid, flags)
      end
    end

    # A connection to a supervisor.
    class Wire
      CHUNK_BYTES = 65_536
      EINTR = 4
      EAGAIN = 11
      FCNTL = Java::JnrConstantsPlatform::Fcntl
      CLOSE_ON_EXEC = 1
      NON_BLOCKING = 0o4000
      private_constant :CHUNK_BYTES, :EINTR, :EAGAIN, :FCNTL, :CLOSE_ON_EXEC, :NON_BLOCKING

      attr_reader :fd

      def initialize(path)
        # Ruby's UNIXSocket needs 95 ms to be loaded, this 30. Only its descriptor is used.
        address = Java::JnrUnixsocket::UnixSocketAddress.new(java.io.File.new(path))
        @channel = Java::JnrUnixsocket::UnixSocketChannel.open(address)
        @fd = @channel.getFD
        POSIX.fcntlInt(@fd, FCNTL::F_SETFD, CLOSE_ON_EXEC)
        @bytes = Java::byte[CHUNK_BYTES].new
        remember
      rescue java.io.IOException => e
        raise IOError, e.message
      end

      # The descriptor as it is now is ours: a fork has another one in its place.
      def remember
        @file = file
      end

      def ours?
        @file == file
      rescue SystemCallError
        false
      end

      # Whether another one is in its place.
      def replaced?
        @file != file
      rescue SystemCallError
        false
      end

      def write(line)
        until line.empty?
          count = retried { POSIX.write(@fd, line.to_java_bytes, line.bytesize) }
          line = line.byteslice(count..)
        end
      end

      # Some bytes; raises EOFError at the end.
      def read
        count = retried { POSIX.read(@fd, @bytes, CHUNK_BYTES) }
        raise EOFError, 'end of the connection' if count.zero?

        String.from_java_bytes(java.util.Arrays.copyOf(@bytes, count))
      end

      alias write_holding write
      alias read_holding read

      # Has a `read` under way come back.
      def shutdown
        @channel.shutdownInput
      rescue java.io.IOException
        nil
      end

      def close
        return unless ours?

        shutdown
        @channel.close
      rescue java.io.IOException
        nil
      end

      def give_up; end

      private

      # A socket's number is unique among sockets: this says as much as device and inode, and fstat by way of Java takes 40 ms at first.
      def file
        File.readlink("/proc/self/fd/#{@fd}")
      end

      def retried
        loop do
          count = yield
          return count if count >= 0

          case error = POSIX.errno
          when EINTR then next
          when EAGAIN
            POSIX.fcntlInt(@fd, FCNTL::F_SETFL, POSIX.fcntlInt(@fd, FCNTL::F_GETFL, 0) & ~NON_BLOCKING)
          else raise SystemCallError.new('the connection', error)
          end
        end
      end
    end
  end
end
