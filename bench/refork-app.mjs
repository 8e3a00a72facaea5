// A server with as many MiB of records as its argument says, and real work a request: it finds records, sorts them, hashes, and renders
// them. It prints the port that it serves on.
import { createHash } from 'node:crypto'
import http from 'node:http'

const mib = Number(process.argv[2] ?? 500)
const port = Number(process.argv[3] ?? 0)
/** Half in buffers, half in objects, as programs have it: some 300 bytes an object. */
const blobs = Array.from({ length: mib / 2 }, (_, i) => Buffer.alloc(1 << 20, (i % 255) + 1))
const records = Array.from({ length: (mib / 2) * 3_300 }, (_, i) => ({
  id: i,
  name: `record ${i}`,
  tags: [`tag${i % 17}`, `tag${i % 101}`],
  price: (i * 7_919) % 10_007,
}))
const cache = new Map()

function answer(id) {
  const from = (id * 7_919) % (records.length - 400)
  const found = records.slice(from, from + 400).sort((a, b) => a.price - b.price)
  const digest = createHash('sha256')
    .update(blobs[id % blobs.length].subarray(0, 65_536))
    .digest('hex')
  const html = found
    .slice(0, 40)
    .map(({ name, tags, price }) => `<li>${name} ${tags.join(', ')} ${price}</li>`)
    .join('')
  cache.set(id % 1_000, html)
  return `<ul>${html}</ul><p>${digest}</p>${process.pid}`
}

const server = http.createServer((request, response) => {
  response.setHeader('x-pid', process.pid)
  response.end(answer(Number(request.url.slice(1)) || 0))
})
server.listen(port, '127.0.0.1', () => console.log(`serving on ${server.address().port}`))
