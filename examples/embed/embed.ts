// The same in TypeScript (or on Node 24), where `await using` stops the supervisor: `npx tsx examples/embed/embed.ts`.
import { fileURLToPath } from 'node:url'
import { Supervisor } from 'warmfork'

const program = fileURLToPath(new URL('program.mjs', import.meta.url))

async function main(): Promise<void> {
  await using supervisor = await Supervisor.start({
    command: ['node', program],
    ready: { output: /ready/ },
    pool: { size: 4 },
  })
  const child = await supervisor.fork()
  child.stdin.end('hello\n')
  for await (const line of child.lines()) console.log(line)
  console.log(await child.exit) // { code: 0, signal: null }
}

await main()
