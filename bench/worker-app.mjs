// The program of the worker-fork bench: an HTTP server with some data in memory, as an application that has booted. It forks itself
// when it is told to, and says how long its event loop stood still meanwhile.
//
//     node worker-app.mjs MIB
import { writeSync } from 'node:fs'
import { createServer } from 'node:http'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout as sleep } from 'node:timers/promises'

const { worker } = process.env.WARMFORK_SOCKET ? await import('../dist/agents/node/worker.js') : {}
const wantedBytes = Number(process.argv[2]) * 1024 * 1024
const records = []
const buffers = []
while (process.memoryUsage.rss() < wantedBytes) {
  for (let i = 0; i < 5_000; i++)
    records.push({ id: records.length, name: `record ${records.length}`, tags: [`a${i % 97}`] })
  for (let i = 0; i < 16; i++) buffers.push(Buffer.alloc(65_536, 1 + (buffers.length % 255)))
}
const server = createServer((request, response) => {
  const record = records[Number(new URL(request.url, 'http://localhost').searchParams.get('id') ?? 0) % records.length]
  response.setHeader('content-type', 'application/json').end(JSON.stringify(record))
})
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
const url = `http://127.0.0.1:${server.address().port}/?id=`
for (let i = 0; i < 200; i++) await (await fetch(url + i)).text()

const say = (value) => writeSync(1, `${JSON.stringify(value)}\n`)

/**
 * The longest time between two turns of the event loop while something goes on. Measured natively: a loop of our own would fill
 * the young generation again and again, which is what the next checkpoint would then write.
 */
const delays = monitorEventLoopDelay({ resolution: 1 })
delays.enable()
async function pauseDuring(action) {
  delays.reset()
  // The first turn after a reset is not counted.
  await sleep(2)
  await action()
  return delays.max / 1e6
}

const answer = () => {
  say({ line: 'fork' })
  process.exit(0)
}
let kept
process.stdin.on('data', async (chunk) => {
  const command = chunk.toString().trim()
  if (command === 'fork') {
    const pauseMs = await pauseDuring(() => worker.fork({}, answer))
    say({ line: 'source', pauseMs })
  } else if (command === 'keep') {
    kept = await worker.checkpoint(answer)
    say({ line: 'kept' })
  } else if (command === 'again') {
    await kept.fork()
    say({ line: 'source' })
  } else if (command === 'drop') kept.drop()
  else say({ line: records[0].name })
})
// A template has no stdin of its user's.
process.on('SIGUSR2', async () => say({ line: 'source', pauseMs: await pauseDuring(() => worker.fork({}, answer)) }))
process.send?.('ready')
worker?.ready()
say({ line: 'ready' })
