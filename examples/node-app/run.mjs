// `node examples/node-app/run.mjs`: boots the catalogue of app/ once, forks three workers from it, gives each a request and
// prints how long all that took. `--json` prints the figures as JSON.
import { execFileSync, spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { Supervisor } from 'warmfork'

const app = fileURLToPath(new URL('app/', import.meta.url))
const command = [process.execPath, `${app}app.js`, 'worker']
const requests = ['/api/search?q=blue+oak+chair', '/products/7', '/api/search?q=red+robot&limit=3']

if (!existsSync(`${app}node_modules`)) {
  console.error('installing the dependencies of the application …')
  execFileSync('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: app,
    stdio: ['ignore', 2, 2],
    timeout: 600_000,
  })
}

/** What a start without warmfork takes, from the spawn until the first answer. */
async function coldStartMs(url) {
  const started = performance.now()
  const worker = spawn(command[0], command.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] })
  const lines = createInterface({ input: worker.stdout })[Symbol.asyncIterator]()
  await lines.next()
  worker.stdin.end(`${JSON.stringify({ url })}\n`)
  await lines.next()
  return performance.now() - started
}

const coldMs = await coldStartMs(requests[0])
const supervisor = await Supervisor.start({ command, ready: { output: /^ready/ }, pool: { size: 0 } })
const children = []
try {
  for (const url of requests) {
    const started = performance.now()
    const child = await supervisor.fork()
    child.stdin.write(`${JSON.stringify({ url })}\n`)
    const { value: line } = await child.lines().next()
    const firstAnswerMs = performance.now() - started
    const { status, body } = JSON.parse(line)
    const { privateBytes } = await child.stats()
    // They stay alive until all three have answered, so that the memory is that of three workers at once.
    children.push({
      child,
      pid: child.pid,
      url,
      status,
      answer: summary(body),
      firstAnswerMs,
      privateMiB: privateBytes / 2 ** 20,
    })
  }
  for (const entry of children) {
    entry.child.stdin.end()
    entry.exit = await entry.child.exit
    delete entry.child
  }
  const template = supervisor.template?.memory?.rssBytes ?? 0
  report({ engine: supervisor.engine, coldMs, templateMiB: template / 2 ** 20, children })
} finally {
  await supervisor.stop()
}

function summary(body) {
  if (body.startsWith('{')) return `${JSON.parse(body).total} found`
  return /<title>(.*)<\/title>/.exec(body)?.[1] ?? body.slice(0, 40)
}

function report(figures) {
  if (process.argv.includes('--json')) {
    console.log(JSON.stringify(figures, null, 2))
    return
  }
  const row = (name, ms, memory, said) =>
    console.log(
      name.padEnd(16),
      `${ms.toFixed(1)} ms`.padStart(10),
      `${memory.toFixed(1)} MiB`.padStart(12),
      ` ${said}`,
    )
  console.log('process'.padEnd(16), 'answers in'.padStart(10), 'own memory'.padStart(12), ' answer')
  row('cold start', figures.coldMs, figures.templateMiB, 'boots, loads, indexes and renders first')
  for (const { pid, url, firstAnswerMs, privateMiB, answer } of figures.children)
    row(`fork ${pid}`, firstAnswerMs, privateMiB, `${url}: ${answer}`)
}
