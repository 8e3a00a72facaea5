# frozen_string_literal: true

module Warmfork
  # `Process._fork`, which Ruby calls to fork and gems wrap (ActiveSupport, connection_pool), so that they run around our forks too. It
  # knows no connection.
  module ForkCall
    ANSWER = :warmfork_fork_answer
    private_constant :ANSWER

    class << self
      # Once, as the program starts: what is wrapped around later stays around ours. The block forks in earnest.
      def install(&real)
        ForkCall.redefine { Process.define_singleton_method(:_fork) { ForkCall.take || real.call } }
      end

      # Without the warning of a method that is redefined.
      def redefine
        verbose, $VERBOSE = $VERBOSE, nil
        yield
      ensure
        $VERBOSE = verbose
      end

      # Runs the wrappers: the call below them gives the answer, 0 or a pid, and forks nothing.
      def wrappers(answer)
        Thread.current[ANSWER] = answer
        Process._fork
      ensure
        Thread.current[ANSWER] = nil
      end

      def take
        Thread.current[ANSWER].tap { |answer| Thread.current[ANSWER] = nil if answer }
      end
    end
  end
end
