# frozen_string_literal: true

# What `RUBYOPT=-r` loads into every Ruby process of a program that warmfork starts: it makes `require 'warmfork'` possible, and
# connects where there is a supervisor. It must load no gem, default gems like json included: Bundler has not chosen versions yet.
directory = File.dirname(__dir__)
$LOAD_PATH.push(directory) unless $LOAD_PATH.include?(directory)

if ENV['WARMFORK_SOCKET']
  begin
    require_relative '../warmfork'
  rescue StandardError, LoadError => e
    # A program without its agent is better than none.
    warn "warmfork: the agent was not loaded: #{e.message} (#{e.class})" if $VERBOSE
  end
end
