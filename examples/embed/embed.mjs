// The API in six lines, for Node 20: `node examples/embed/embed.mjs`.
import { fileURLToPath } from 'node:url'
import { Supervisor } from 'warmfork'

const program = fileURLToPath(new URL('program.mjs', import.meta.url))
const supervisor = await Supervisor.start({ command: ['node', program], ready: { output: /ready/ }, pool: { size: 4 } })
try {
  const child = await supervisor.fork()
  child.stdin.end('hello\n')
  for await (const line of child.lines()) console.log(line)
  console.log(await child.exit) // { code: 0, signal: null }
} finally {
  await supervisor.stop()
}
