# A Rack-like application on JRuby, with real work a request: it parses JSON, sorts, renders a template, hashes. It prints the port that
# it serves on. A request is counted by whoever sends it.
require 'java'
require 'digest'
require 'erb'
require 'json'

# It writes head and body one after the other, and would wait for the acknowledgement of the first.
java.lang.System.set_property('sun.net.httpserver.nodelay', 'true')
java_import 'com.sun.net.httpserver.HttpServer'
java_import 'java.net.InetSocketAddress'
java_import 'java.util.concurrent.Executors'

ITEMS = JSON.generate((0...300).map { |i| { 'id' => i, 'name' => "item #{i}", 'price' => (i * 7919) % 1009, 'tags' => ["a#{i % 7}", "b#{i % 11}"] } })
PAGE = ERB.new(<<~HTML, trim_mode: '-')
  <ul>
  <%- items.each do |item| -%>
    <li><%= item['name'] %>: <%= item['price'] %> (<%= item['tags'].join(', ') %>)</li>
  <%- end -%>
  </ul>
HTML

class Application
  def call(env)
    id = env['PATH_INFO'][1..].to_i
    items = JSON.parse(ITEMS).map { |item| item.merge('price' => (item['price'] + id) % 1009) }
    items = items.sort_by { |item| [item['price'], item['name']] }.first(120)
    totals = items.group_by { |item| item['tags'].first }.transform_values { |group| group.sum { |item| item['price'] } }
    page = PAGE.result_with_hash(items: items)
    [200, { 'content-type' => 'text/html' }, [page, JSON.generate(totals), Digest::SHA256.hexdigest(page)]]
  end
end

application = Application.new
server = HttpServer.create(InetSocketAddress.new('127.0.0.1', (ARGV[0] || 0).to_i), 0)
server.create_context('/') do |exchange|
  status, headers, body = application.call({ 'PATH_INFO' => exchange.request_uri.path })
  bytes = body.join.to_java_bytes
  headers.each { |name, value| exchange.response_headers.set(name, value) }
  exchange.response_headers.set('x-pid', File.readlink('/proc/self'))
  exchange.send_response_headers(status, bytes.length)
  exchange.response_body.write(bytes)
  exchange.close
end
server.executor = Executors.new_fixed_thread_pool(2)
server.start
$stdout.sync = true
puts "serving on #{server.address.port}"
sleep
