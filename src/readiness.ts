/** What "ready" can mean, watched from outside. It knows a started program, and nothing of what follows. */
import { statSync } from 'node:fs'
import { get as httpGet } from 'node:http'
import { get as httpsGet } from 'node:https'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { WarmforkError } from './errors.js'
import { TICK_MS, treeCpuMs } from './linux/proc.js'
import type { Readiness, TemplateView } from './options.js'
import { lastLines, quoted, type Template } from './template.js'

const POLL_MS = 50
/** One attempt at a port or URL; then another is made. */
const ATTEMPT_MS = 5_000
/** A line that is longer is looked at in its last part alone. */
const LINE_CHARACTERS = 64 * 1024
/** Share of one core below which a program counts as idle. */
const IDLE_CPU = 0.05

/**
 * Resolves when the template is ready.
 * @throws TEMPLATE_NOT_READY, TEMPLATE_EXITED, or the reason of `signal`
 */
export async function untilReady(
  template: Template,
  ready: Readiness,
  command: readonly string[],
  signal?: AbortSignal,
): Promise<void> {
  const tried = `boot ${quoted(command)}`
  const wanted = describe(ready)
  const late = () => {
    const last = lastLines(template.output)
    return new WarmforkError('TEMPLATE_NOT_READY', {
      tried,
      happened: `within ${ready.timeoutMs} ms ${wanted} did not happen${last ? `; it wrote last: ${last}` : '; it wrote nothing'}`,
      output: template.output,
      ...(ready.kind === 'idle'
        ? { remedy: 'Say what ready means, with `ready`: `{ output: /…/ }` or `{ port: … }`, for example.' }
        : {}),
    })
  }
  await template.during((signal) => watch(template, ready, tried, signal), {
    tried,
    timeoutMs: ready.timeoutMs,
    late,
    signal,
  })
}

function describe(ready: Readiness): string {
  switch (ready.kind) {
    case 'output':
      return `an output that matches ${ready.output} (${ready.stream})`
    case 'port':
      return `a connection to ${ready.host}:${ready.port}`
    case 'http':
      return `a good answer from ${ready.url}`
    case 'file':
      return `the file ${ready.path}`
    case 'delay':
      return `a delay of ${ready.delayMs} ms`
    case 'idle':
      return `a time of ${ready.idleMs} ms without output and CPU use`
    case 'agent':
      return 'the word of an agent that the program is ready'
    case 'function':
      return 'what the function `ready` waits for'
  }
}

async function watch(template: Template, ready: Readiness, tried: string, signal: AbortSignal): Promise<void> {
  switch (ready.kind) {
    case 'output':
      return outputMatches(template, ready, signal)
    case 'port':
      return poll(() => accepts(ready.host, ready.port), signal)
    case 'http':
      return poll(() => answersWell(ready.url, signal), signal)
    case 'file':
      return poll(() => isNewFile(ready.path, template.startedAt), signal)
    case 'delay':
      return sleep(ready.delayMs, undefined, { signal })
    case 'idle':
      return idle(template, ready.idleMs, signal)
    case 'agent':
      return poll(() => template.agents?.isReady ?? false, signal)
    case 'function':
      return poll(async () => {
        try {
          return (await ready.check(template.view(signal))) !== false
        } catch (error) {
          throw new WarmforkError('TEMPLATE_NOT_READY', {
            tried,
            happened: `the function \`ready\` threw: ${error instanceof Error ? error.message : String(error)}`,
            cause: error,
            output: template.output,
          })
        }
      }, signal)
  }
}

/**
 * Asks again what a program that was ready before can be asked again: its port, its URL, the embedder's function. What tells of a
 * boot (output, a file, a time) says nothing of a fork. `ports`: where it listens now, in place of where it did.
 * @returns what was asked, as a phrase; undefined where nothing can be
 * @throws the reason of `signal`, or what the function throws
 */
export async function untilReadyAgain(
  ready: Readiness,
  ports: ReadonlyMap<number, number>,
  view: TemplateView,
): Promise<string | undefined> {
  const { signal } = view
  switch (ready.kind) {
    case 'port': {
      const port = ports.get(ready.port)
      if (port === undefined) return undefined
      await poll(() => accepts(ready.host, port), signal)
      return describe(ready)
    }
    case 'http': {
      const url = new URL(ready.url)
      const port = ports.get(Number(url.port || (url.protocol === 'https:' ? 443 : 80)))
      if (port === undefined) return undefined
      url.port = String(port)
      await poll(() => answersWell(url.href, signal), signal)
      return describe(ready)
    }
    case 'function':
      await poll(async () => (await ready.check(view)) !== false, signal)
      return describe(ready)
    default:
      return undefined
  }
}

async function poll(attempt: () => boolean | Promise<boolean>, signal: AbortSignal): Promise<void> {
  while (!(await attempt())) await sleep(POLL_MS, undefined, { signal })
}

function outputMatches(
  template: Template,
  ready: Extract<Readiness, { kind: 'output' }>,
  signal: AbortSignal,
): Promise<void> {
  const { output } = ready
  // Without `g` and `y`, which would make a test begin where the last one ended.
  const pattern = output instanceof RegExp ? new RegExp(output.source, output.flags.replace(/[gy]/g, '')) : undefined
  const matches = (line: string) => (pattern ? pattern.test(line) : line.includes(output as string))
  const open = { stdout: new TextLines(), stderr: new TextLines() }
  return new Promise((resolve) => {
    const onOutput = (stream: 'stdout' | 'stderr', chunk: Buffer) => {
      if (ready.stream !== 'both' && ready.stream !== stream) return
      if (!open[stream].take(chunk).some(matches)) return
      template.off('output', onOutput)
      resolve()
    }
    template.on('output', onOutput)
    signal.addEventListener('abort', () => template.off('output', onOutput))
  })
}

/** The lines of a stream, the unfinished last one too: a prompt has no line end. */
class TextLines {
  readonly #decoder = new TextDecoder()
  #rest = ''

  take(chunk: Buffer): string[] {
    const lines = (this.#rest + this.#decoder.decode(chunk, { stream: true })).split('\n')
    this.#rest = lines.at(-1)!.slice(-LINE_CHARACTERS)
    return lines.map((line) => line.replace(/\r$/, ''))
  }
}

function accepts(host: string, port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({ host, port })
    const done = (result: boolean) => {
      socket.destroy()
      resolve(result)
    }
    socket.setTimeout(ATTEMPT_MS, () => done(false))
    socket.once('connect', () => done(true))
    socket.once('error', () => done(false))
  })
}

/** A GET on a connection of its own, which is closed when this resolves: an open one would keep the template from its rest. */
function answersWell(url: string, signal: AbortSignal): Promise<boolean> {
  const get = url.startsWith('https:') ? httpsGet : httpGet
  return new Promise((resolve) => {
    let good = false
    const request = get(url, { agent: false, timeout: ATTEMPT_MS, signal }, (response) => {
      good = response.statusCode !== undefined && response.statusCode >= 200 && response.statusCode < 300
      response.resume()
      response.on('error', () => {})
    })
    request.once('timeout', () => request.destroy())
    request.on('error', () => {})
    request.once('close', () => resolve(good))
  })
}

/** The kernel stamps files by a clock that is up to a tick behind (10 ms at CONFIG_HZ=100). */
function isNewFile(path: string, startedAt: number): boolean {
  const found = statSync(path, { throwIfNoEntry: false })
  return found !== undefined && found.ctimeMs >= startedAt - TICK_MS
}

async function idle(template: Template, idleMs: number, signal: AbortSignal): Promise<void> {
  const samples: { at: number; cpuMs: number }[] = []
  for (;;) {
    const now = Date.now()
    samples.push({ at: now, cpuMs: treeCpuMs(template.pid) })
    // Keep one sample that is as old as the window.
    while (samples.length > 1 && samples[1]!.at <= now - idleMs) samples.shift()
    const first = samples[0]!
    const elapsedMs = now - first.at
    // What nobody waited for takes its ticks with it: a change either way is a sign of life.
    const usedMs = Math.abs(samples.at(-1)!.cpuMs - first.cpuMs)
    if (elapsedMs >= idleMs && usedMs <= elapsedMs * IDLE_CPU && now - template.lastOutputAt >= idleMs) return
    await sleep(Math.min(POLL_MS, idleMs), undefined, { signal })
  }
}
