# frozen_string_literal: true

module Warmfork
  # Messages to the program, or ends of its forks, and the thread that hands them to its handlers. It knows no connection.
  class Inbox
    # Without a handler the oldest are dropped beyond this.
    MAX_WAITING = 1_000

    def initialize
      @lock = Mutex.new
      @handlers = []
      @messages = Queue.new
    end

    def add(handler)
      raise ArgumentError, 'no block given' unless handler

      @lock.synchronize { @handlers += [handler] }
      start
      handler
    end

    def deliver(data, from)
      @messages.pop(true) if @handlers.empty? && @messages.size >= MAX_WAITING
      @messages << [data, from]
    end

    # In a fork: what was not handed over is the source's. After a real fork the thread is gone too.
    def renew
      @messages.clear
      @lock = Mutex.new unless @thread&.alive?
      start unless @handlers.empty?
    end

    # The thread, as long as it waits for a message.
    def idle_thread
      @thread if @messages.num_waiting.positive?
    end

    private

    def start
      return if @thread&.alive?

      @thread = Thread.new { loop { hand_over(*@messages.pop) } }
      @thread.name = 'warmfork messages'
      @thread.thread_variable_set(:fork_safe, true)
    end

    def hand_over(data, from)
      @handlers.each do |handler|
        handler.lambda? ? handler.call(*[data, from].first(handler.arity.abs)) : handler.call(data, from)
      rescue StandardError => e
        warn "warmfork: a handler of messages failed: #{e.full_message(highlight: false)}"
      end
    end
  end
end
