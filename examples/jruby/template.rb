# What is forked: a JRuby that has booted, is warm, and waits for the program that each fork is to run.
warm = $stdout.dup
20.times { |i| eval("'hello'.dup << #{i}.to_s; nil") }
warm.puts 'ready'
warm.flush

program = $stdin.read
$stdout.sync = true
eval(program)
