# frozen_string_literal: true

require 'ffi'

module Warmfork
  module Platform
    # poll(2), for which JRuby has no method: what the kernel says of a descriptor that Java takes for the one from before the fork.
    module Poll
      extend FFI::Library
      ffi_lib FFI::Library::LIBC
      attach_function :poll, %i[pointer ulong int], :int

      # POLLERR, POLLHUP and POLLNVAL: told without being asked for.
      GONE = 0x8 | 0x10 | 0x20
      private_constant :GONE

      # Whether nobody is at the other end.
      def self.alone?(descriptor)
        FFI::MemoryPointer.new(:char, 8) do |about|
          about.put_int(0, descriptor)
          about.put_int(4, 0)
          return poll(about, 1, 0) == 1 && (about.get_short(6) & GONE) != 0
        end
      end
      # Once before a checkpoint.
      alone?(0)
    end
  end
end
