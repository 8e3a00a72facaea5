# frozen_string_literal: true

module Warmfork
  # Where requests begin and end in Puma, WEBrick, and in what Rack::Builder builds. A server is changed when it is there, never loaded
  # for it: after each `require` is looked whether one is.
  module Servers
    # Puma's, from the request to its answer. False has the connection closed.
    module Puma
      def handle_request(client, *rest)
        request = begin
          Warmfork.requests.begin(-> { "#{client.env['REQUEST_METHOD']} #{client.env['PATH_INFO']}" }, client.io)
        rescue Requests::Dropped
          return false
        end
        return super if request.nil?

        begin
          super
        ensure
          request.finish
        end
      end
    end

    # An event stream's head is sent with the others.
    module PumaHeaders
      def str_headers(env, status, headers, *rest)
        Requests.note_type(headers.find { |name, _| name.to_s.casecmp?('content-type') }&.last)
        super
      end
    end

    # WEBrick's: its answer is sent after `service`, and `run` has the whole connection.
    module WEBrick
      def run(sock)
        Thread.current[:warmfork_socket] = sock
        super
      ensure
        Requests.current&.finish(answered: false)
      end

      def service(req, res)
        Warmfork.requests.begin(-> { "#{req.request_method} #{req.unparsed_uri}" }, Thread.current[:warmfork_socket])
        super
      rescue Requests::Dropped
        res.instance_variable_set(:@warmfork_dropped, true)
        res.keep_alive = false
      end
    end

    module WEBrickAnswer
      def send_response(socket)
        return if @warmfork_dropped

        super
      ensure
        Requests.current&.finish
      end

      def send_header(socket)
        super.tap { Requests.note_type(self['content-type']) }
      end
    end

    module Builder
      def to_app(...)
        RackCounter.new(super)
      end
    end

    CHANGES = {
      %i[Puma Server] => ->(server) { change(server, Puma) },
      %i[Puma Request] => ->(request) { change(request, PumaHeaders) },
      %i[WEBrick HTTPServer] => ->(server) { change(server, WEBrick) },
      %i[WEBrick HTTPResponse] => ->(answer) { change(answer, WEBrickAnswer) },
      %i[Rack Builder] => ->(builder) { change(builder, Builder) },
    }
    private_constant :CHANGES

    class << self
      def install
        @left = CHANGES.to_a
        look
        Servers.watch(Kernel)
      end

      # For those that came since the last time, and are whole.
      def look
        @left.delete_if do |path, change|
          found = find(path) or next
          change.call(found)
        end
      end

      # As RubyGems does it: what is aliased around it later, by Bootsnap or Zeitwerk, calls it.
      def watch(kernel)
        kernel.module_eval do
          alias_method :warmfork_original_require, :require
          private :warmfork_original_require
          def require(path)
            warmfork_original_require(path).tap { |loaded| Servers.look if loaded }
          end
          private :require
        end
      end

      private

      # Never loads what is only announced.
      def find(path)
        path.reduce(Object) do |from, name|
          return nil if !from.const_defined?(name, false) || from.autoload?(name, false)

          from.const_get(name, false)
        end
      end

      # Gives whether it is there as a whole.
      def change(owner, methods)
        names = methods.instance_methods(false)
        return false unless names.all? { |name| owner.method_defined?(name) || owner.private_method_defined?(name) }

        # The visibility stays.
        hidden = names.select { |name| owner.private_method_defined?(name) }
        methods.send(:private, *hidden) unless hidden.empty?
        owner.prepend(methods)
        true
      end
    end
  end
end
