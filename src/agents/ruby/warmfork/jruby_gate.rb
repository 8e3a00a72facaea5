# frozen_string_literal: true

module Warmfork
  module Platform
    # Has Ruby's threads stand still: each stops at the next place at which it would look for an exception from another thread
    # (Thread#raise), and goes on from there. JRuby asks the masks of `Thread.handle_interrupt` then, on the thread itself: one is put
    # under those that are there which waits before it answers "never". No thread is woken for it: a `sleep` that is
    # cut short would run a job too early. Threads that Java code has started, and those in a long call of Java, go on.
    class Gate
      # Time for busy threads to come to such a place.
      ARRIVAL_SECONDS = 0.05
      # What is sent to a thread. No Object: a mask of the program's for all of them does not hold it up.
      Signal = Class.new(BasicObject)
      private_constant :ARRIVAL_SECONDS, :Signal

      # Before a checkpoint: reflection takes its time.
      def self.prepare
        return if @inside

        type = org.jruby.RubyThread.java_class.to_java
        @inside = [
          type.getDeclaredField('interruptMaskStack'),
          type.getDeclaredField('pendingInterruptQueue'),
          type.getDeclaredMethod('pendingInterruptEnqueue', org.jruby.runtime.builtin.IRubyObject.java_class.to_java),
        ].each { |each| each.setAccessible(true) }
        new.practise
      rescue java.lang.Throwable
        # Another JRuby, inside. Its threads go on.
        @inside = []
      end

      def self.inside
        @inside
      end

      def initialize
        @stopped = []
        @masks, @queue, @enqueue = Gate.inside
      end

      # Through all of it once, stopping nothing: what runs for the first time in a fork costs it 20 ms.
      def practise
        close([], 0)
        open
      end

      # Gives the names of the threads that go on. `idle`: those that wait for us anyway.
      def close(idle, count = 1)
        latch = @latch = java.util.concurrent.CountDownLatch.new(count)
        arrived = @arrived = java.util.concurrent.ConcurrentHashMap.new
        threads = Thread.list - idle
        return names(threads) unless @masks

        # Threads that are started by a stopped one inherit it: it answers for nothing else.
        @mask = Hash.new do |_, type|
          next unless type.equal?(Signal)

          # The wait itself looks for exceptions.
          latch.await if arrived.putIfAbsent(Thread.current.object_id, true).nil?
          :never
        end
        threads.each { |thread| stop(thread) }
        names(late(threads))
      end

      def open
        @stopped.each do |thread, signal|
          @queue.get(thread).remove(signal)
          masks = @masks.get(thread)
          (masks.size - 1).downto(0) { |index| masks.remove(index) if masks.get(index).equal?(@mask) }
        end
        @stopped = []
        @latch&.countDown
      end

      private

      def stop(thread)
        thread = JRuby.ref(thread)
        signal = Signal.new
        @masks.get(thread).add(0, @mask)
        @enqueue.invoke(thread, signal)
        thread.setInterrupt
        @stopped << [thread, signal]
      end

      # One that waits for something stops as soon as it has it.
      def late(threads)
        deadline = Process.clock_gettime(Process::CLOCK_MONOTONIC) + ARRIVAL_SECONDS
        loop do
          left = threads.select { |thread| !@arrived.containsKey(thread.object_id) && runs?(thread) }
          return left if left.empty? || Process.clock_gettime(Process::CLOCK_MONOTONIC) > deadline

          java.lang.Thread.sleep(1)
        end
      end

      # Java's own threads, which Ruby knows once they have called it, always have the status `run`.
      def runs?(thread)
        thread.status == 'run' && JRuby.ref(thread).getNativeThread&.getState == java.lang.Thread::State::RUNNABLE
      end

      def names(threads)
        threads.map { |thread| thread == Thread.main ? 'main' : (thread.name || thread.inspect) }
      end
    end
  end
end
