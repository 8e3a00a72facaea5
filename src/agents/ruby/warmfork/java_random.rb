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
        bytes = Platform.random_bytes(64, seed).to_java_bytes
        (@secure || []).each { |generator| attempt { generator.setSeed(bytes) } }
        contexts.each { |context| attempt { context.secureRandom&.setSeed(bytes) } }
        attempt { JRuby.runtime.getRandom.setSeed(long(seed)) }
        openssl.each { |generator| attempt { generator.reseed(bytes) } }
        @static ||= @unsafe ? STATIC.filter_map { |name, field| attempt { static(name, field) } } : []
        @static.each { |value| attempt { renew_static(value, bytes, seed) } }
        attempt { renew_threads(seed) } if @seed_of_thread
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

      def long(seed)
        Platform.random_bytes(8, seed).unpack1('q')
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

      def renew_static(value, bytes, seed)
        case value
        when java.security.SecureRandom then value.setSeed(bytes)
        when java.util.Random then value.setSeed(long(seed))
        when java.util.concurrent.atomic.AtomicLong then value.set(long(seed))
        end
      end

      # Each thread's own ThreadLocalRandom.
      def renew_threads(seed)
        java.lang.Thread.getAllStackTraces.keySet.each { |thread| @unsafe.putLong(thread, @seed_of_thread, long(seed)) }
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
