# frozen_string_literal: true

module Warmfork
  # The program's hooks in the order of their registration, and how they are run within a time. It knows no connection.
  class Hooks
    # Why a hook did not do: the protocol's `error`.
    class Failure < StandardError
      def self.of(error, hook)
        new({ hook: text(hook), message: text(error.message), stack: text(error.full_message(highlight: false))[0, 10_000] })
      end

      # For JSON, which has UTF-8 alone.
      def self.text(value)
        value.to_s.encode(Encoding::UTF_8, invalid: :replace, undef: :replace).scrub
      end

      attr_reader :details

      def initialize(details)
        super(details[:message])
        @details = details
      end
    end

    Entry = Struct.new(:kind, :name, :block)
    # Not a StandardError: a hook's own `rescue` must not take it.
    TimeUp = Class.new(Exception)
    private_constant :Entry, :TimeUp

    def initialize
      @lock = Mutex.new
      @entries = []
    end

    def add(kind, name, block)
      raise ArgumentError, 'no block given' unless block

      entry = Entry.new(kind, name || block.source_location&.join(':') || kind.to_s, block)
      @lock.synchronize { @entries += [entry] }
      block
    end

    def any?(kind)
      @entries.any? { |entry| entry.kind == kind }
    end

    # Raises a Failure, after what was done is undone.
    def before(timeout_ms)
      ran = []
      within(timeout_ms) do
        step('$stdout.flush') { [$stdout, $stderr].each { |io| io.flush if io.respond_to?(:flush) } }
        @entries.select { |entry| entry.kind == :before }.reverse_each do |entry|
          step(entry.name) { entry.block.call }
          ran << entry
        end
      end
    rescue Failure
      after(timeout_ms) { |owner| owner && ran.include?(owner) }
      raise
    end

    # All of them, or those whose owner, the hook before the checkpoint in front of them, the block wants. Gives the first failure.
    def after(timeout_ms)
      first = owner = nil
      @entries.each do |entry|
        owner = entry if entry.kind == :before
        next if entry.kind != :after || (block_given? && !yield(owner))

        begin
          within(timeout_ms) { step(entry.name) { entry.block.call } }
        rescue Failure => e
          first ||= e
        end
      end
      first
    end

    # Raises a Failure. The time is kept by the caller, who ends the process.
    def on_fork(payload)
      @entries.each do |entry|
        next unless entry.kind == :on_fork

        @running = entry.name
        step(entry.name) { Hooks.yield_to(entry.block, payload) }
      end
    end

    # The hook that is running now, for who finds that it takes too long.
    attr_reader :running

    # A lambda takes what it declares, a block what it likes.
    def self.yield_to(block, value)
      block.lambda? && block.arity.zero? ? block.call : block.call(value)
    end

    # Runs one thing that may fail: what it raises becomes a Failure with its name, `exit` too.
    def step(name)
      @running = name
      yield
    rescue Failure, TimeUp
      raise
    rescue Exception => e # rubocop:disable Lint/RescueException
      raise Failure.of(e, name)
    end

    private

    def within(timeout_ms)
      runner = Thread.current
      Thread.handle_interrupt(TimeUp => :never) do
        watch = Thread.new do
          sleep(timeout_ms / 1000.0)
          runner.raise(TimeUp)
        end
        begin
          Thread.handle_interrupt(TimeUp => :immediate) { yield }
        ensure
          watch.kill
          watch.join
        end
      end
    rescue TimeUp => e
      raise Failure.new(hook: @running, message: "it was not done within #{timeout_ms} ms", stack: e.backtrace.to_a.join("\n"))
    end
  end
end
