# frozen_string_literal: true

module Warmfork
  # Where MRI up to 3.2 remembers its pid: as the owner of its signal pipe and of its timer, in two C variables. In a process whose pid
  # is another one, signals do not wake the main thread, and `fork` ends in "[BUG] timer_posix was not dead". Nothing of Ruby's own sets
  # them but a real fork, so they are looked for in the interpreter's data, recognised by what stands beside them, and written in a fork.
  module RememberedPid
    WORD = 4
    private_constant :WORD

    class << self
      # Before a checkpoint.
      def find
        pid = Platform.system_call(:getpid)
        return if @places && @places.all? { |place| peek(place) == pid }

        timers = File.read('/proc/self/timers').scan(/^ID: (\d+)$/).flatten.map(&:to_i)
        @pid = pid
        @places = segments.flat_map { |from, to| places(from, File.binread('/proc/self/mem', to - from, from), timers) }
      rescue SystemCallError
        @places = []
      end

      # In a fork. Lets no other thread run.
      def renew
        pid = Platform.system_call(:getpid)
        (@places || []).each { |place| poke(place, pid) if peek(place) == @pid }
        @pid = pid
      end

      private

      # Variables of the interpreter: of its library, or of the program where it is in that.
      def segments
        lines = File.readlines('/proc/self/maps', chomp: true).map do |line|
          range, rights, _, _, _, path = line.split(' ', 6)
          [*range.split('-').map(&:hex), rights, path]
        end
        own = lines.find { |_, _, _, path| path && File.basename(path).start_with?('libruby') }&.last || File.readlink('/proc/self/exe')
        lines.each_with_index.filter_map do |(from, to, rights, path), index|
          next unless rights.start_with?('rw') && path == own

          # What is zero in the file follows as a mapping of its own.
          after = lines[index + 1]
          to = after[1] if after && after[0] == to && after[3].nil? && after[2].start_with?('rw')
          [from, to]
        end
      end

      def places(from, bytes, timers)
        words = bytes.unpack('l*')
        words.each_index.filter_map do |index|
          next unless words[index] == @pid && (timer?(words, index, timers) || pipe?(words, index))

          from + (index * WORD)
        end
      end

      # { state, owner, timer }
      def timer?(words, index, timers)
        index.positive? && words[index - 1].between?(0, 3) && words[index + 2] == 0 && timers.include?(words[index + 1])
      end

      # { [read, write], [read, write], owner }: pipes, or event descriptors twice each.
      def pipe?(words, index)
        index >= 4 && words[index - 4, 4].all? do |fd|
          fd > 2 && File.readlink("/proc/self/fd/#{fd}").match?(/\A(?:anon_inode:\[eventfd\]|pipe:)/)
        rescue SystemCallError
          false
        end
      end

      def peek(place)
        copy { |word| [place, word] }
      end

      def poke(place, pid)
        copy(pid) { |word| [word, place] }
      end

      # Through a pipe: the kernel reads and writes at any address, and says so where there is nothing.
      def copy(value = 0)
        ends = '....'.b * 2
        word = [value].pack('l')
        Platform.system_call(:pipe2, ends, 0)
        reader, writer = ends.unpack('ll')
        from, to = yield([word].pack('p').unpack1('J'))
        Platform.system_call(:write, writer, from, WORD)
        Platform.system_call(:read, reader, to, WORD)
        word.unpack1('l')
      ensure
        [reader, writer].each { |fd| Platform.system_call(:close, fd) if fd }
      end
    end
  end
end
