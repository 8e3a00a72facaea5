// `node examples/jruby/run.mjs`: `jruby -e "puts 'hello'"` cold, and as forks of a JRuby that has booted once. The first
// run downloads JRuby into `.cache`. `--json` prints the figures as JSON.
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { Supervisor } from 'warmfork'
import { jruby } from './setup.mjs'

const program = jruby()

function coldStartMs() {
  const started = performance.now()
  const said = execFileSync(program, ['-e', "puts 'hello'"], { encoding: 'utf8', timeout: 120_000 })
  if (said !== 'hello\n') throw new Error(`a cold JRuby said ${JSON.stringify(said)}`)
  return performance.now() - started
}

// The first start reads 60 MB from the disk: it would not be fair to count it.
coldStartMs()
const coldMs = coldStartMs()

const supervisor = await Supervisor.start({
  command: [program, fileURLToPath(new URL('template.rb', import.meta.url))],
  ready: { output: /^ready/ },
  pool: { size: 0 },
})
const forks = []
try {
  for (let i = 0; i < 5; i++) {
    const started = performance.now()
    const child = await supervisor.fork()
    child.stdin.end("puts 'hello'\n")
    const { value: said } = await child.lines().next()
    forks.push({ pid: child.pid, said, helloMs: performance.now() - started, exit: await child.exit })
  }
} finally {
  await supervisor.stop()
}

if (process.argv.includes('--json')) console.log(JSON.stringify({ engine: supervisor.engine, coldMs, forks }, null, 2))
else {
  const row = (name, ms, said) => console.log(name.padEnd(16), `${ms.toFixed(1)} ms`.padStart(12), ` ${said}`)
  console.log('process'.padEnd(16), 'hello after'.padStart(12), ' output')
  row('cold jruby', coldMs, 'hello')
  for (const { pid, said, helloMs } of forks) row(`fork ${pid}`, helloMs, said)
}
