/** CPython, MRI and the shell as Debian has them, and what is compiled here: Go and C on several libraries. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { MemoryMode } from '../../src/engines/engine.js'
import { cached, debianAvailable, debianInstall, PROBES, type Runtime, run } from './runtime.js'

// By path: a version manager's program of the same name may stand before it in PATH.
export const cpython: Runtime = {
  name: 'CPython',
  local: true,
  available: () => debianAvailable('/usr/bin/python3', 'python3-minimal'),
  install: () => debianInstall('/usr/bin/python3', 'python3'),
  command: () => ['/usr/bin/python3', join(PROBES, 'probe.py')],
  version: async () => (await run('/usr/bin/python3', ['--version'])).trim().replace('Python ', ''),
  memory: 'cow',
}

export const mri: Runtime = {
  name: 'MRI',
  available: () => debianAvailable('/usr/bin/ruby', 'ruby'),
  install: () => debianInstall('/usr/bin/ruby', 'ruby'),
  command: () => ['/usr/bin/ruby', join(PROBES, 'probe.rb')],
  version: async () => (await run('/usr/bin/ruby', ['--version'])).split(' ')[1]!,
  memory: 'cow',
}

/** A shell with a child of its own: two processes, and pipes between them. */
export const shell: Runtime = {
  name: 'bash with a child',
  local: true,
  available: () => debianAvailable('/bin/bash', 'bash'),
  install: async () => {},
  command: () => ['/bin/bash', join(PROBES, 'probe.sh')],
  version: async () => /version (\S+?)\(/.exec(await run('/bin/bash', ['--version']))?.[1] ?? '?',
  memory: 'cow',
  remembersPid: true,
}

export const go: Runtime = {
  name: 'Go, static',
  available: () => debianAvailable('go', 'golang-go'),
  install: async (cache) => {
    await debianInstall('go', 'golang-go')
    const source = join(PROBES, 'probe.go')
    await cached(cache, 'go-probe', readFileSync(source, 'utf8'), async (into) => {
      const env = { CGO_ENABLED: '0', GO111MODULE: 'off', GOFLAGS: '', GOTOOLCHAIN: 'local' }
      await run('go', ['build', '-o', join(into, 'probe'), source], { timeoutMs: 600_000, env })
    })
  },
  command: (cache) => [join(cache, 'go-probe/probe')],
  version: async () => (await run('go', ['version'])).split(' ')[2]!.replace(/^go/, ''),
}

interface CVariant {
  name: string
  compiler: string
  /** The file whose absence says that the package is missing. */
  needs: [file: string, packageName: string]
  flags?: string[]
  arguments?: string[]
  local?: true
  memory?: MemoryMode
}

function c(variant: CVariant): Runtime {
  const source = join(PROBES, 'probe.c')
  const directory = `c-probe-${variant.name.replaceAll(/[^a-z0-9]+/gi, '-')}`
  return {
    name: variant.name,
    ...(variant.local ? { local: true as const } : {}),
    available: async () =>
      (await debianAvailable(variant.compiler, 'gcc')) ?? (await debianAvailable(...variant.needs)),
    install: async (cache) => {
      await debianInstall('gcc', 'gcc')
      await debianInstall('/usr/include/stdio.h', 'libc6-dev')
      await debianInstall(...variant.needs)
      const recipe = JSON.stringify([variant, readFileSync(source, 'utf8')])
      await cached(cache, directory, recipe, async (into) => {
        await run(variant.compiler, ['-O2', '-pthread', source, '-o', join(into, 'probe'), ...(variant.flags ?? [])])
      })
    },
    command: (cache) => [join(cache, directory, 'probe'), ...(variant.arguments ?? [])],
    version: async () =>
      variant.needs[1] === 'gcc'
        ? (await run('ldd', ['--version'])).split('\n')[0]!.split(' ').at(-1)!
        : debianVersion(variant.needs[1]),
    ...(variant.memory ? { memory: variant.memory } : {}),
  }
}

async function debianVersion(packageName: string): Promise<string> {
  return (await run('dpkg-query', ['-W', '-f', `\${Version}`, packageName])).trim()
}

export const cRuntimes: readonly Runtime[] = [
  c({ name: 'C on glibc', compiler: 'gcc', needs: ['gcc', 'gcc'], local: true, memory: 'cow' }),
  c({ name: 'C on musl', compiler: 'musl-gcc', needs: ['musl-gcc', 'musl-tools'], memory: 'cow' }),
  // Static: the shim cannot be in it.
  c({
    name: 'C on musl, static',
    compiler: 'musl-gcc',
    needs: ['musl-gcc', 'musl-tools'],
    flags: ['-static'],
    memory: 'copy',
  }),
  c({
    name: 'C with jemalloc',
    compiler: 'gcc',
    needs: ['/usr/lib/x86_64-linux-gnu/libjemalloc.so.2', 'libjemalloc2'],
    flags: ['-l:libjemalloc.so.2'],
    memory: 'cow',
  }),
  c({ name: 'C with 64 threads', compiler: 'gcc', needs: ['gcc', 'gcc'], arguments: ['64'], memory: 'cow' }),
]
