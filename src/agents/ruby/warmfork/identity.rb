# frozen_string_literal: true

module Warmfork
  # What a fork takes over before its hooks: random generators of its own, arguments, environment, directory. It knows Ruby's standard
  # library, and leaves to the platform what differs between MRI and JRuby.
  module Identity
    module_function

    # `message`: the protocol's `forked`.
    def take_over(message, hooks)
      hooks.step('warmfork: random generators') { renew_random(decode64(message['seed'].to_s)) }
      hooks.step('warmfork: pid and thread ids') { Platform.renew_ids(message) }
      arguments, environment, directory = message.values_at('args', 'env', 'cwd')
      hooks.step('warmfork: args') { ARGV.replace(arguments.map { |text| native(text) }) } if arguments
      hooks.step('warmfork: env') { apply(environment) } if environment
      hooks.step('warmfork: cwd') { Platform.chdir(native(directory)) } if directory
    end

    # The default generator (Kernel#rand, Random.rand, shuffle, sample) and the one of temporary names. SecureRandom draws on the
    # kernel or on OpenSSL, which sees the new pid. Generators that the program has made with Random.new are its own affair.
    def renew_random(seed)
      Platform.renew_random(seed)
      Random.srand(Platform.random_integer(seed))
      return unless defined?(Dir::Tmpname)

      names = Dir::Tmpname.const_get(:RANDOM, false) if Dir::Tmpname.const_defined?(:RANDOM, false)
      names.send(:initialize, Platform.random_integer(seed)) if names.is_a?(Random)
    end

    def apply(environment)
      (environment['unset'] || []).each { |name| ENV.delete(name) }
      (environment['set'] || {}).each { |name, text| ENV[name] = native(text) }
    end

    # A *text* of the protocol, as Ruby has arguments and variables from outside.
    def native(text)
      bytes = text.is_a?(Hash) ? decode64(text['base64']) : text.dup
      bytes.force_encoding(Encoding.find('locale'))
    end

    # Data to be sent. Raises a Warmfork::Error where JSON cannot have it.
    def encode(data)
      if data.is_a?(String) && (data.encoding == Encoding::BINARY || !data.valid_encoding?)
        { base64: [data].pack('m0') }
      else
        # Looked at now, so that the error meets who has given it.
        json.generate(data, max_nesting: 0)
        { json: data }
      end
    rescue StandardError => e
      raise Error.new('BAD_OPTION', "the data cannot be sent: #{e.message}")
    end

    # Loaded when it is needed, and asked for once: RubyGems looks through directories at each `require`, also of what is there, and lets
    # other threads run meanwhile.
    def json
      @json ||= begin
        require 'json'
        JSON
      end
    end

    def decode(data)
      data.key?('json') ? data['json'] : decode64(data['base64'])
    end

    def decode64(text)
      text.unpack1('m')
    end
  end
end
