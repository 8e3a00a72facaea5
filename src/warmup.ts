/** What is done with a ready template so that its children start warm. It knows a started program, and nothing of what follows. */
import { spawn } from 'node:child_process'
import { Agent as HttpAgent, get as httpGet } from 'node:http'
import { Agent as HttpsAgent, get as httpsGet } from 'node:https'
import { endTrees } from './ending.js'
import { WarmforkError } from './errors.js'
import type { Warmup } from './options.js'
import { OUTPUT_TAIL_BYTES } from './pipes.js'
import { lastLines, quoted, type Template } from './template.js'

export interface WarmupSurroundings {
  readonly cwd: string
  readonly env: Readonly<Record<string, string>>
  readonly uid?: number | undefined
  readonly gid?: number | undefined
}

/**
 * Resolves when the warm-up is done and its connections are closed.
 * @throws WARMUP_FAILED, TEMPLATE_EXITED, or the reason of `signal`
 */
export async function warmUp(
  template: Template,
  warmup: Warmup,
  around: WarmupSurroundings,
  signal?: AbortSignal,
): Promise<void> {
  const tried = 'warm the template up'
  const late = () =>
    new WarmforkError('WARMUP_FAILED', {
      tried,
      happened: `it took longer than ${warmup.timeoutMs} ms`,
      remedy: 'Raise `warmup.timeoutMs`, or make the warm-up smaller.',
      output: template.output,
    })
  await template.during((signal) => perform(template, warmup, around, tried, signal), {
    tried,
    timeoutMs: warmup.timeoutMs,
    late,
    signal,
  })
}

async function perform(
  template: Template,
  warmup: Warmup,
  around: WarmupSurroundings,
  tried: string,
  signal: AbortSignal,
): Promise<void> {
  const failed = (happened: string, more: { cause?: unknown; output?: string } = {}) =>
    new WarmforkError('WARMUP_FAILED', { tried, happened, ...more })
  switch (warmup.kind) {
    case 'command':
      return runCommand(
        warmup.command,
        { ...around, env: { ...around.env, WARMFORK_TEMPLATE_PID: String(template.pid) } },
        failed,
        signal,
      )
    case 'http':
      return request(warmup, failed, signal)
    case 'function':
      try {
        await warmup.run(template.view(signal))
      } catch (error) {
        throw failed(`the function threw: ${error instanceof Error ? error.message : String(error)}`, { cause: error })
      }
  }
}

type Failed = (happened: string, more?: { cause?: unknown; output?: string }) => WarmforkError

async function runCommand(
  command: readonly [string, ...string[]],
  around: WarmupSurroundings,
  failed: Failed,
  signal: AbortSignal,
): Promise<void> {
  const [file, ...args] = command
  const ids =
    process.getuid?.() === 0 && around.uid !== undefined ? { uid: around.uid, gid: around.gid ?? around.uid } : {}
  const child = spawn(file, args, {
    cwd: around.cwd,
    env: { ...around.env },
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
    ...ids,
  })
  let output = ''
  const take = (chunk: Buffer) => {
    output = (output + chunk.toString()).slice(-OUTPUT_TAIL_BYTES)
  }
  child.stdout.on('data', take)
  child.stderr.on('data', take)
  const exited = new Promise<[number | null, NodeJS.Signals | null] | Error>((resolve) => {
    child.once('exit', (code, exitSignal) => resolve([code, exitSignal]))
    child.once('error', resolve)
  })
  const onAbort = () => {
    if (child.pid !== undefined) void endTrees([{ pid: child.pid, exited, kill: (name) => child.kill(name) }], 0)
  }
  signal.addEventListener('abort', onAbort)
  const result = await exited
  signal.removeEventListener('abort', onAbort)
  if (result instanceof Error)
    throw failed(`${quoted(command)} could not be started: ${result.message}`, { cause: result })
  const [code, exitSignal] = result
  if (code === 0) return
  const how = exitSignal ? `by ${exitSignal}` : `with status ${code}`
  throw failed(`${quoted(command)} ended ${how}${output ? `, and wrote last: ${lastLines(output)}` : ''}`, { output })
}

async function request(warmup: Extract<Warmup, { kind: 'http' }>, failed: Failed, signal: AbortSignal): Promise<void> {
  const agents = { http: new HttpAgent({ keepAlive: true }), https: new HttpsAgent({ keepAlive: true }) }
  const get = (url: string) =>
    new Promise<void>((resolve, reject) => {
      const secure = url.startsWith('https:')
      const options = { agent: secure ? agents.https : agents.http, signal }
      const sent = (secure ? httpsGet : httpGet)(url, options, (response) => {
        const status = response.statusCode ?? 0
        response.once('end', () =>
          status >= 400 ? reject(failed(`${url} was answered with status ${status}`)) : resolve(),
        )
        response.once('error', (error) =>
          reject(failed(`the answer from ${url} broke off: ${error.message}`, { cause: error })),
        )
        response.resume()
      })
      sent.once('error', (error) => reject(failed(`${url} gave no answer: ${error.message}`, { cause: error })))
    })
  const queue = Array.from({ length: warmup.times }, () => warmup.urls).flat()
  const worker = async () => {
    for (let url = queue.shift(); url !== undefined; url = queue.shift()) await get(url)
  }
  try {
    await Promise.all(Array.from({ length: warmup.concurrency }, worker))
  } finally {
    queue.length = 0
    // An open connection would keep the template from its rest.
    agents.http.destroy()
    agents.https.destroy()
  }
}
