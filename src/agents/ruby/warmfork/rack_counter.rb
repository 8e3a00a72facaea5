# frozen_string_literal: true

module Warmfork
  # A Rack application around another one, whose requests are counted: from the call until the server closes the body. It needs no Rack.
  class RackCounter
    def initialize(app)
      @app = app
    end

    def call(env)
      request = Warmfork.requests.begin(-> { "#{env['REQUEST_METHOD']} #{env['PATH_INFO']}" })
      return @app.call(env) if request.nil?

      begin
        answer = @app.call(env)
        whole = whole?(env, answer) or answer = [answer[0], answer[1], Body.new(answer[2], request)]
        answer
      ensure
        # It raised, threw (:async), took the connection over, or is there as a whole.
        request.finish if whole || answer.nil? || whole.nil?
      end
    end

    def respond_to_missing?(name, all = false)
      @app.respond_to?(name, all)
    end

    def method_missing(name, ...)
      @app.respond_to?(name) ? @app.public_send(name, ...) : super
    end

    private

    def whole?(env, answer)
      status, headers, body = answer
      type = headers&.find { |name, _| name.to_s.casecmp?('content-type') }&.last
      Requests.note_type(type)
      status.to_i.negative? || env['rack.hijack_io'] || headers&.key?('rack.hijack') || body.is_a?(Array)
    end

    # What a server closes when all is sent, or nothing more can be.
    class Body < BasicObject
      def initialize(body, request)
        @body = body
        @request = request
      end

      def close
        @body.close if @body.respond_to?(:close)
      ensure
        @request.finish
      end

      # Rack 3 has such a body closed by `to_ary` itself.
      def to_ary
        @body.to_ary
      ensure
        @request.finish
      end

      def respond_to?(name, all = false)
        name.to_sym == :close || @body.respond_to?(name, all)
      end

      def method_missing(name, ...)
        @body.__send__(name, ...)
      end
    end
  end
end
