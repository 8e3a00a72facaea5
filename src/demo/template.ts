/**
 * The program that the demo forks: a Node process that fills itself with data at its start, half of it JavaScript objects
 * and half of it buffers, until it is as large as asked, and then answers each line with one. It knows nothing of warmfork.
 *
 *     node template.js MIB
 */
import { createInterface } from 'node:readline'

const wantedBytes = Number(process.argv[2] ?? 100) * 1024 * 1024
const records: { id: number; name: string; tags: string[]; score: number }[] = []
const buffers: Buffer[] = []

/** Looked at once a MiB or so: the look itself takes longer than filling. */
const RECORDS_A_STEP = 5_000
const BUFFER_BYTES = 64 * 1024

while (process.memoryUsage.rss() < wantedBytes) {
  for (let i = 0; i < RECORDS_A_STEP; i++) {
    const id = records.length
    records.push({ id, name: `record ${id}`, tags: [`a${id % 97}`, `b${id % 89}`], score: id / 7 })
  }
  for (let i = 0; i < 16; i++) buffers.push(Buffer.alloc(BUFFER_BYTES, 1 + (buffers.length % 255)))
}

createInterface({ input: process.stdin }).on('line', (line) => {
  const record = records[Number(line) % records.length] ?? records[0]
  process.stdout.write(`${record?.name ?? 'empty'}\n`)
})
process.stdin.on('end', () => process.exit(0))
process.stdout.write('ready\n')
