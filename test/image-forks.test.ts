import { spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import {
  appendFileSync,
  copyFileSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { release } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import { stat } from '../src/linux/proc.js'
import { type Child, kill, Laboratory } from './fixtures/forks.js'
import { newerGlibc, onNewerGlibc } from './fixtures/newer-glibc.js'
import { compileC } from './runtimes/compile.js'
import { RUNTIMES } from './runtimes/index.js'
import { cached, debianInstall, PROJECT, RUNTIME_CACHE, run } from './runtimes/runtime.js'

const lab = new Laboratory()
afterAll(() => lab.close())
afterEach(() => lab.endAll())

const PYTHON = '/usr/bin/python3'
const ONE_OF_EACH = join(import.meta.dirname, 'fixtures/image/one-of-each.py')

beforeAll(async () => {
  await RUNTIMES.find(({ name }) => name === 'CPython')!.install(RUNTIME_CACHE)
  await debianInstall('gcc', 'gcc')
  await debianInstall('/usr/include/stdio.h', 'libc6-dev')
}, 600_000)

async function compile(name: string, source: string, ...flags: string[]): Promise<string> {
  const directory = lab.fresh('c')
  writeFileSync(join(directory, `${name}.c`), source)
  const output = join(directory, flags.includes('-shared') ? `lib${name}.so` : name)
  await run('gcc', ['-O1', join(directory, `${name}.c`), '-o', output, ...flags])
  return output
}

/** A Python program of its own, which must print `ready`. */
function python(source: string, ...args: string[]) {
  const path = join(lab.fresh('py'), 'program.py')
  writeFileSync(path, source)
  return lab.start([PYTHON, path, ...args])
}

async function forks(generation: number, count: number): Promise<Child[]> {
  const all: Child[] = []
  for (let i = 0; i < count; i++) all.push((await lab.fork(generation)).resume())
  return all
}

describe.each(['cow', 'copy'] as const)('forks of a program with one of each open file, %s', (memory) => {
  it('find all of it, several beside each other and beside their template', async () => {
    const directory = lab.fresh('one')
    const template = lab.start([PYTHON, ONE_OF_EACH, directory])
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, memory)
    const all = await forks(number, 3)
    const answers: string[] = []
    for (const child of all) answers.push(await child.talk.ask('check'))
    // What waits in a FIFO is there once, for the first who reads.
    expect(answers).toEqual(['fifo-read', 'ok', 'ok'])
    expect(await template.talk.ask('check')).toBe('ok')
  })

  it('can be made at once, and leave nothing where files were unlinked', async () => {
    const directory = lab.fresh('one')
    const template = lab.start([PYTHON, ONE_OF_EACH, directory])
    await template.talk.untilReady()
    const before = readdirSync(directory).sort()
    const { number } = await lab.checkpoint(template, memory)
    const all = await Promise.all(Array.from({ length: 6 }, () => lab.fork(number)))
    expect(new Set(all.map(({ pid }) => pid)).size).toBe(6)
    expect(readdirSync(directory).sort()).toEqual(before)
    for (const child of all.slice(0, 2)) expect(await child.resume().talk.ask('check')).toMatch(/^(ok|fifo-read)$/)
  })
})

describe('files that change after the checkpoint', () => {
  const WRITER = `
import os, sys
log = os.open(sys.argv[1], int(sys.argv[2]) | os.O_CREAT, 0o600)
os.write(log, b"from the template\\n")
print("ready", flush=True)
for line in sys.stdin:
    os.write(log, b"from a child\\n")
    print("written", flush=True)
`
  it.each([
    ['O_WRONLY', 'O_APPEND', 0o1 | 0o2000],
    ['O_WRONLY', '', 0o1],
    ['O_RDWR', '', 0o2],
  ])('a log that has grown, open with %s %s', async (_, __, flags) => {
    const log = join(lab.fresh('log'), 'app.log')
    const template = python(WRITER, log, String(flags))
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow')
    appendFileSync(log, 'meanwhile\n')
    const [child] = await forks(number, 1)
    expect(await child!.talk.ask('write')).toBe('written')
    expect(readFileSync(log, 'utf8')).toContain('from a child\n')
  })

  it('a log that has grown, for one who reads it', async () => {
    const log = join(lab.fresh('log'), 'app.log')
    writeFileSync(log, 'first\n')
    const template = python(
      'import sys\nlog = open(sys.argv[1])\nlog.readline()\nprint("ready", flush=True)\nfor _ in sys.stdin: print(log.readline(), end="", flush=True)',
      log,
    )
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow')
    appendFileSync(log, 'second\n')
    const [child] = await forks(number, 1)
    expect(await child!.talk.ask('read')).toBe('second')
  })

  it('a log that was cut', async () => {
    const log = join(lab.fresh('log'), 'app.log')
    const template = python(WRITER, log, String(0o1 | 0o2000))
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow')
    truncateSync(log)
    const [child] = await forks(number, 1)
    expect(await child!.talk.ask('write')).toBe('written')
    expect(readFileSync(log, 'utf8')).toBe('from a child\n')
  })

  it('a mapped library that was replaced by another, as an upgrade does', async () => {
    const library = await compile('word', 'const char *word(void) { return "old"; }\n', '-shared', '-fPIC')
    const newer = await compile(
      'word',
      'int pad[9999] = {1}; const char *word(void) { return "new"; }\n',
      '-shared',
      '-fPIC',
    )
    const program = await compile(
      'speak',
      `#include <stdio.h>
       const char *word(void);
       int main(void) { char line[64]; puts("ready"); fflush(stdout);
         while (fgets(line, sizeof line, stdin)) { puts(word()); fflush(stdout); } }`,
      library,
    )
    const template = lab.start([program])
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow')
    await forks(number, 1)
    // Beside, then over: the old file lives on for those who map it.
    copyFileSync(newer, `${library}.new`)
    renameSync(`${library}.new`, library)
    const all = await forks(number, 2)
    for (const child of all) expect(await child.talk.ask('say')).toBe('old')
    expect(await template.talk.ask('say')).toBe('old')
  })

  it('a mapped library that was replaced before the checkpoint', async () => {
    const library = await compile(
      'word',
      'char word[20000] = "old"; const char *say(void) { return word; }\n',
      '-shared',
      '-fPIC',
    )
    const program = await compile(
      'speak',
      `#include <stdio.h>
       #include <string.h>
       extern char word[20000]; const char *say(void);
       int main(void) { char line[64]; memset(word + 4096, 7, 15000); puts("ready"); fflush(stdout);
         while (fgets(line, sizeof line, stdin)) {
           int right = 1; for (int i = 4096; i < 19096; i++) right &= word[i] == 7;
           puts(right ? say() : "lost"); fflush(stdout); } }`,
      library,
    )
    const template = lab.start([program])
    await template.talk.untilReady()
    const bytes = readFileSync(library)
    // As large as before, and other content everywhere.
    writeFileSync(`${library}.new`, Buffer.alloc(bytes.length, 0x58))
    renameSync(`${library}.new`, library)
    const { number } = await lab.checkpoint(template, 'cow')
    const all = await forks(number, 2)
    for (const child of all) expect(await child.talk.ask('say')).toBe('old')
  })
})

describe('standard streams of a fork', () => {
  it('have nothing in them that waited in the template', async () => {
    const template = python(`
import sys
print("ready", flush=True)
for line in sys.stdin:
    print("heard " + line.strip(), flush=True)
`)
    await template.talk.untilReady()
    await template.stop()
    template.talk.say('to the template')
    const { number } = await lab.checkpoint(template, 'cow')
    const [child] = await forks(number, 1)
    expect(await child!.talk.ask('to the child')).toBe('heard to the child')
    template.goOn()
    expect(await template.talk.line()).toBe('heard to the template')
  })
})

describe('when the process that restored a fork is killed', () => {
  it('the fork stands still', async () => {
    const script = join(import.meta.dirname, 'fixtures/image/fork-and-wait.ts')
    // One that does not end with its stdin.
    const command = [PYTHON, '-c', 'import time; print("ready", flush=True); time.sleep(600)']
    const maker = spawn(process.execPath, ['--import', 'tsx', script, ...command], {
      cwd: PROJECT,
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    let pid = 0
    let directory = ''
    try {
      for await (const line of createInterface({ input: maker.stdout! })) {
        const [, number, path] = /^pid (\d+) (.*)$/.exec(line)!
        pid = Number(number)
        directory = path!
        break
      }
      expect(stat(pid)?.state).toMatch(/[SR]/)
      const gone = once(maker, 'exit')
      maker.kill('SIGKILL')
      await gone
      const until = Date.now() + 5000
      while (stat(pid)?.state !== 'T' && Date.now() < until) await delay(5)
      expect(stat(pid)?.state).toBe('T')
    } finally {
      maker.kill('SIGKILL')
      if (pid) kill(pid, 'SIGKILL')
      if (directory) rmSync(directory, { recursive: true, force: true })
    }
  }, 60_000)
})

describe('listening sockets', () => {
  const get = async (port: number) =>
    (await fetch(`http://127.0.0.1:${port}/`, { signal: AbortSignal.timeout(5000) })).text()

  it('are shared by forks of an unmodified server, and outlive each of them', async () => {
    const directory = lab.fresh('www')
    writeFileSync(join(directory, 'index.html'), 'a page')
    const template = lab.start([
      PYTHON,
      '-u',
      '-c',
      `
import http.server, functools, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
print(server.server_address[1])
print("ready")
server.serve_forever()`,
      directory,
    ])
    const [port] = (await template.talk.untilReady()).map(Number)
    const { number } = await lab.checkpoint(template, 'cow')
    const all = [await lab.fork(number), await lab.fork(number)]
    await lab.end(template)
    // One after the other, the other stopped.
    for (const child of all) {
      child.resume()
      expect(await get(port!)).toBe('a page')
      kill(child.pid, 'SIGSTOP')
    }
    await lab.end(...all)
    // With nobody there, a connection waits; the next fork takes it.
    const waiting = get(port!)
    await delay(50)
    const [next] = await forks(number, 1)
    expect(await waiting).toBe('a page')
    expect(stat(next!.pid)).toBeDefined()
  })

  it('of UDP too', async () => {
    const template = python(`
import os, socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
print("ready", flush=True)
while True:
    data, sender = server.recvfrom(1000)
    server.sendto(b"%d heard %s" % (os.getpid(), data), sender)
`)
    const [port] = (await template.talk.untilReady()).map(Number)
    const { number } = await lab.checkpoint(template, 'cow')
    const [first, second] = [await lab.fork(number), await lab.fork(number)]
    await lab.end(template)
    const client = createSocket('udp4')
    try {
      for (const child of [first, second]) {
        child.resume()
        client.send('hello', port!, '127.0.0.1')
        const [answer] = (await once(client, 'message', { signal: AbortSignal.timeout(5000) })) as [Buffer]
        expect(answer.toString()).toBe(`${child.pid} heard hello`)
        kill(child.pid, 'SIGSTOP')
        // Until it stands still it would take the next one too.
        while (stat(child.pid)?.state !== 'T') await new Promise(setImmediate)
      }
    } finally {
      client.close()
    }
  })
})

// From 2.43 on the kernel does not clear a thread's id at its end any more, and stacks have guard pages of a new kind.
it.skipIf(!newerGlibc)('threads of a program on a newer glibc know their new ids', async () => {
  const template = lab.start(onNewerGlibc(await compileC('threads64'), lab.fresh('glibc')))
  await template.talk.untilReady()
  const { number } = await lab.checkpoint(template, 'cow')
  for (const child of await forks(number, 2)) expect(await child.talk.ask('check')).toBe('ok')
  expect(await template.talk.ask('check')).toBe('ok')
})

describe('random bytes', () => {
  const RANDOM = `#include <stdio.h>
#include <sys/random.h>
#include <gnu/libc-version.h>
int main(void) {
  unsigned char bytes[32]; char line[64];
  getrandom(bytes, sizeof bytes, 0);
  printf("%s\\nready\\n", gnu_get_libc_version()); fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    getrandom(bytes, sizeof bytes, 0);
    for (int i = 0; i < 32; i++) printf("%02x", bytes[i]);
    puts(""); fflush(stdout);
  }
}`
  const [major, minor] = release().split('.').map(Number) as [number, number]
  const inVdso = major > 6 || (major === 6 && minor >= 11)

  const expectDifferent = async (command: readonly string[]) => {
    const template = lab.start(command)
    const said = await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow')
    const answers: string[] = []
    for (const child of [...(await forks(number, 3)), template]) answers.push(await child.talk.ask('next'))
    for (const answer of answers) expect(answer).toMatch(/^[0-9a-f]{64}$/)
    expect(new Set(answers).size).toBe(4)
    return { said, number }
  }

  it.skipIf(!newerGlibc || !inVdso)(
    'of getrandom differ in all forks, on a glibc that draws them in memory',
    async () => {
      const program = await compile('random', RANDOM)
      const { said, number } = await expectDifferent(onNewerGlibc(program, lab.fresh('glibc')))
      expect(Number(said[0]!.split('.')[1])).toBeGreaterThanOrEqual(41)
      const { edits } = (await (await lab.engine()).store.get(number)).manifest as unknown as {
        edits: { wipedRanges: number }
      }
      expect(edits.wipedRanges).toBeGreaterThan(0)
    },
  )

  it('of crypto/rand differ in all forks of a Go program', async () => {
    await debianInstall('go', 'golang-go')
    const source = `package main
import ("bufio"; "crypto/rand"; "fmt"; "os"; "runtime")
func main() {
  b := make([]byte, 32)
  rand.Read(b)
  fmt.Println(runtime.Version())
  fmt.Println("ready")
  in := bufio.NewScanner(os.Stdin)
  for in.Scan() { rand.Read(b); fmt.Printf("%x\\n", b) }
}
`
    await cached(RUNTIME_CACHE, 'go-random', source, async (into) => {
      writeFileSync(join(into, 'random.go'), source)
      const env = { CGO_ENABLED: '0', GO111MODULE: 'off', GOFLAGS: '', GOTOOLCHAIN: 'local' }
      await run('go', ['build', '-o', join(into, 'random'), join(into, 'random.go')], { timeoutMs: 600_000, env })
    })
    await expectDifferent([join(RUNTIME_CACHE, 'go-random/random')])
  }, 900_000)
})
