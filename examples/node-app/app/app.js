// A product catalogue with search, built on Fastify. `node app.js serve` listens on HTTP; `node app.js worker` answers one
// request for each line of its stdin, through the same routes. It knows nothing of warmfork.
import { createInterface } from 'node:readline'
import pino from 'pino'
import { loadCatalogue } from './catalogue.js'
import { buildServer } from './server.js'

const mode = process.argv[2] ?? 'serve'
// Logs go to stderr: in a worker, stdout belongs to the answers.
const log = pino({ level: process.env.LOG_LEVEL ?? 'warn' }, pino.destination({ dest: 2, sync: true }))

const catalogue = loadCatalogue(log)
const server = await buildServer(catalogue, log)
// Pages that every visitor asks for are rendered at the start.
await catalogue.warmCache((url) => server.inject(url))

if (mode === 'serve') {
  const address = await server.listen({ port: Number(process.env.PORT ?? 3000) })
  console.log(`ready on ${address}`)
} else if (mode === 'worker') {
  const lines = createInterface({ input: process.stdin })
  let last = Promise.resolve()
  lines.on('line', (line) => {
    last = last.then(() => answer(line))
  })
  lines.on('close', () => last.then(() => server.close()))
  console.log('ready')
} else {
  console.error('usage: node app.js [serve|worker]')
  process.exitCode = 2
}

/** Answers `{ "url": … }`, and what else Fastify's `inject` takes, with `{ "status", "type", "body" }`. */
async function answer(line) {
  let response
  try {
    response = await server.inject(JSON.parse(line))
  } catch (error) {
    response = { statusCode: 400, headers: { 'content-type': 'text/plain' }, body: error.message }
  }
  const type = response.headers['content-type']
  process.stdout.write(`${JSON.stringify({ status: response.statusCode, type, body: response.body })}\n`)
}
