# frozen_string_literal: true

module Warmfork
  # Java's random generators, and its memory of the pid, in a fork. What the Java library keeps to itself is reached through
  # sun.misc.Unsafe, where that is still there. It knows nothing of Ruby's own generators.
  module JavaRandom
    # All generators of such a kind in a process share what one is seeded with.
    SHARED = %w[NativePRNG NativePRNGNonBlocking NativePRNGBlocking].freeze
    # Static variables: a generator, or an AtomicLong from which seeds of new generators are drawn.
    STATIC = [
      %w[java.util.UUID$Holder numberGenerator],
      %w[java.lang.Math$RandomNumberGeneratorHolder randomNumberGenerator],
      %w[java.util.Collections r],
      %w[java.util.Random seedUniquifier],
      %w[java.util.concurrent.ThreadLocalRandom seeder],
      %w[java.util.SplittableRandom defaultGen],
      %w[jdk.internal.util.random.RandomSupport$ seedUniquifier],
    ].freeze

    class << self
      # Before a checkpoint, which pays for the loading of classes.
      def prepare
        return openssl if @secure

        @secure = SHARED.filter_map { |name| attempt { java.security.SecureRandom.getInstance(name) } }
        @unsafe = attempt { unsafe }
        @pid = @unsafe && attempt { pid_of_handle }
        # Asked of ThreadLocalRandom: a class that is not there yet draws its seed in each fork, the same in all.
        attempt { java.util.concurrent.ThreadLocalRandom.current }
        @seed_of_thread = attempt { @unsafe.objectFieldOffset(java_class('java.lang.Thread').getDeclaredField('threadLocalRandomSeed')) }
        renew('')
      end

      def renew(seed)
        threads = @seed_of_thread ? every_thread : []
        @static ||= @unsafe ? STATIC.filter_map { |name, field| attempt { static(name, field) } } : []
        # All at once: in a fork each line of Ruby runs as if for the first time.
        bytes, *longs = Platform.random_bytes(64 + (8 * (1 + @static.size + threads.size)), seed).unpack('a64q*')
        bytes = bytes.to_java_bytes
        (@secure || []).each { |generator| attempt { generator.setSeed(bytes) } }
        contexts.each { |context| attempt { context.secureRandom&.setSeed(bytes) } }
        openssl.each { |generator| attempt { generator.reseed(bytes) } }
        attempt { JRuby.runtime.getRandom.setSeed(longs.pop) }
        @static.each { |value| attempt { renew_static(value, bytes, longs.pop) } }
        # Each thread's own ThreadLocalRandom.
        threads.each { |thread| @unsafe.putLong(thread, @seed_of_thread, longs.pop) }
      end

      # `ProcessHandle.current.pid` is asked of the system once.
      def remember_pid(pid)
        handle, offset = @pid
        attempt { @unsafe.putLong(handle, offset, pid) } if handle
      end

      private

      # What this Java does not have, or does not give, is left alone: docs/uniqueness.md has the table.
      def attempt
        yield
      rescue StandardError, java.lang.Throwable
        nil
      end

      def java_class(name)
        java.lang.Class.forName(name)
      end

      def unsafe
        field = java_class('sun.misc.Unsafe').getDeclaredField('theUnsafe')
        field.setAccessible(true)
        field.get(nil)
      end

      def static(class_name, name)
        field = java_class(class_name).getDeclaredField(name)
        @unsafe.getObject(@unsafe.staticFieldBase(field), @unsafe.staticFieldOffset(field))
      end

      def renew_static(value, bytes, long)
        case value
        when java.security.SecureRandom then value.setSeed(bytes)
        when java.util.Random then value.setSeed(long)
        when java.util.concurrent.atomic.AtomicLong then value.set(long)
        end
      end

      def every_thread
        group = java.lang.Thread.currentThread.getThreadGroup
        group = group.getParent while group.getParent
        threads = java.lang.Thread[group.activeCount * 2].new
        group.enumerate(threads, true)
        # What is written into must be a thread: Unsafe does not ask.
        threads.to_a.grep(java.lang.Thread)
      end

      # Each of Ruby's threads has a generator, on which its OpenSSL draws.
      def contexts
        Thread.list.filter_map { |thread| JRuby.ref(thread).getContext }
      end

      # What Ruby's OpenSSL draws on in JRuby: generators of Bouncy Castle's, to which a new seed says nothing.
      def openssl
        return [] unless defined?(OpenSSL::Random)

        @openssl ||= %w[Default NonceAndIV].filter_map do |name|
          attempt do
            name = "org.bouncycastle.jcajce.provider.drbg.DRBG$#{name}"
            field = java.lang.Class.forName(name, true, JRuby.runtime.getJRubyClassLoader).getDeclaredField('random')
            field.setAccessible(true)
            field.get(nil)
          end
        end
      end

      def pid_of_handle
        [static('java.lang.ProcessHandleImpl', 'current'),
         @unsafe.objectFieldOffset(java_class('java.lang.ProcessHandleImpl').getDeclaredField('pid'))]
      end
    end
  end
end
