// An Express-like application, with real work a request: it runs through middleware, parses JSON, sorts, renders a template, hashes. It
// prints the port that it serves on.
import { createHash } from 'node:crypto'
import { readlinkSync } from 'node:fs'
import http from 'node:http'

const ITEMS = JSON.stringify(
  Array.from({ length: 900 }, (_, id) => ({
    id,
    name: `item ${id}`,
    price: (id * 7_919) % 1_009,
    tags: [`a${id % 7}`, `b${id % 11}`],
  })),
)

/** A template as they are compiled: a function from its text. */
const template = (text) => {
  const source = text.replace(/`/g, '\\`').replace(/\{\{(.+?)\}\}/g, (_, expression) => ['${', '}'].join(expression))
  return new Function('item', `return \`${source}\``)
}
const line = template('<li>{{item.name}}: {{item.price}} ({{item.tags.join(", ")}})</li>')

const application = {
  layers: [],
  use(layer) {
    this.layers.push(layer)
    return this
  },
  handle(request, response) {
    let at = 0
    const next = () => this.layers[at++]?.(request, response, next)
    next()
  },
}
application
  .use((request, _, next) => {
    request.id = Number(request.url.slice(1)) || 0
    next()
  })
  .use((request, _, next) => {
    request.items = JSON.parse(ITEMS).map((item) => ({ ...item, price: (item.price + request.id) % 1_009 }))
    next()
  })
  .use((request, response) => {
    const items = request.items.sort((a, b) => a.price - b.price || (a.name < b.name ? -1 : 1)).slice(0, 300)
    const totals = {}
    for (const { tags, price } of items) totals[tags[0]] = (totals[tags[0]] ?? 0) + price
    const page = `<ul>${items.map((item) => line(item)).join('\n')}</ul>`
    const digest = createHash('sha256').update(page).digest('hex')
    response.setHeader('x-pid', readlinkSync('/proc/self'))
    response.end(page + JSON.stringify(totals) + digest)
  })

const server = http.createServer((request, response) => application.handle(request, response))
server.listen(Number(process.argv[2] ?? 0), '127.0.0.1', () => console.log(`serving on ${server.address().port}`))
