/** Node in its versions, Bun, Deno and Next.js, each from npm; the running Node as it is. */
import { cpSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { cached, npmInstall, PROBES, type Runtime, run } from './runtime.js'

const PROBE = join(PROBES, 'probe.mjs')

export const runningNode: Runtime = {
  name: `Node ${process.versions.node.split('.')[0]}`,
  local: true,
  available: async () => undefined,
  install: async () => {},
  command: () => [process.execPath, PROBE],
  version: async () => process.version,
  memory: 'cow',
  remembersPid: true,
}

/** A Node of the npm package `node`, which brings a real binary. */
export function npmNode(range: string): Runtime {
  const directory = `node-${range}`
  const program = (cache: string) => join(cache, directory, 'node_modules/node/bin/node')
  return {
    name: range === 'latest' ? 'Node, newest' : `Node ${range}`,
    available: async () => undefined,
    install: (cache) => cached(cache, directory, `node@${range}`, (into) => npmInstall(into, [`node@${range}`])),
    command: (cache) => [program(cache), PROBE],
    version: async (cache) => (await run(program(cache), ['--version'])).trim(),
    memory: 'cow',
    remembersPid: true,
  }
}

export const bun: Runtime = {
  name: 'Bun',
  available: async () => undefined,
  install: (cache) => cached(cache, 'bun', 'bun@latest', (into) => npmInstall(into, ['bun@latest'])),
  command: (cache) => [join(cache, 'bun/node_modules/.bin/bun'), PROBE],
  version: async (cache) => (await run(join(cache, 'bun/node_modules/.bin/bun'), ['--version'])).trim(),
  remembersPid: true,
}

export const deno: Runtime = {
  name: 'Deno',
  available: async () => undefined,
  install: (cache) => cached(cache, 'deno', 'deno@latest', (into) => npmInstall(into, ['deno@latest'])),
  command: (cache) => [join(cache, 'deno/node_modules/.bin/deno'), 'run', '--allow-all', PROBE],
  version: async (cache) => (await run(join(cache, 'deno/node_modules/.bin/deno'), ['--version'])).split(/\s/)[1]!,
  remembersPid: true,
}

/** `next start`, with the probe loaded by the hook that Next.js has for its start (instrumentation.js). */
export const next: Runtime = {
  name: 'Next.js',
  available: async () => undefined,
  install: (cache) => {
    const app = join(PROBES, 'next')
    const sources = ['package.json', 'instrumentation.js', 'app/page.js', 'app/layout.js', 'next.config.mjs']
    const recipe = sources.map((name) => readFileSync(join(app, name), 'utf8')).join('\0')
    return cached(cache, 'next', recipe, async (into) => {
      cpSync(app, into, { recursive: true })
      await run('npm', ['install', '--no-audit', '--no-fund', '--no-progress', '--loglevel=error'], {
        cwd: into,
        timeoutMs: 600_000,
      })
      await run('npx', ['next', 'build'], { cwd: into, timeoutMs: 600_000, env: { NEXT_TELEMETRY_DISABLED: '1' } })
    })
  },
  // Port 0: the kernel chooses one, so that nothing collides.
  command: (cache) => [
    '/usr/bin/env',
    `PROBE=${PROBE}`,
    'NEXT_TELEMETRY_DISABLED=1',
    process.execPath,
    join(cache, 'next/node_modules/next/dist/bin/next'),
    'start',
    '--hostname',
    '127.0.0.1',
    '--port',
    '0',
    join(cache, 'next'),
  ],
  version: async (cache) =>
    (JSON.parse(readFileSync(join(cache, 'next/node_modules/next/package.json'), 'utf8')) as { version: string })
      .version,
  memory: 'cow',
  remembersPid: true,
}
