/** Builds the C programs of test/fixtures/c, once for each content and compiler. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { cached, debianInstall, PROJECT, RUNTIME_CACHE, run } from './runtime.js'

export type CFixture = 'draw' | 'foreign-threads' | 'holder' | 'jemalloc-check' | 'mapzoo' | 'randmap' | 'threads64'

/** The path of the program. gcc, musl-gcc and jemalloc are installed where they are missing and we are root. */
export async function compileC(name: CFixture, compiler: 'gcc' | 'musl-gcc' = 'gcc'): Promise<string> {
  const source = join(PROJECT, 'test/fixtures/c', `${name}.c`)
  const flags = ['-O2', '-pthread', ...(name === 'jemalloc-check' ? ['-l:libjemalloc.so.2'] : [])]
  await debianInstall('gcc', 'gcc')
  await debianInstall('/usr/include/stdio.h', 'libc6-dev')
  if (compiler === 'musl-gcc') await debianInstall('musl-gcc', 'musl-tools')
  if (name === 'jemalloc-check') await debianInstall('/usr/lib/x86_64-linux-gnu/libjemalloc.so.2', 'libjemalloc2')
  const directory = `${name}-${compiler}`
  await cached(RUNTIME_CACHE, directory, JSON.stringify([flags, readFileSync(source, 'utf8')]), async (into) => {
    // Libraries after the source: the linker looks for what it misses from left to right.
    await run(compiler, [source, '-o', join(into, name), ...flags])
  })
  return join(RUNTIME_CACHE, directory, name)
}

/**
 * The path of the program of random mappings, with its own code at a fixed, low address: CRIU runs its system calls in the first
 * executable mapping, and fails where that is a shared one of the random ones.
 */
export async function compileRandmap(): Promise<string> {
  await debianInstall('gcc', 'gcc')
  await debianInstall('/usr/include/stdio.h', 'libc6-dev')
  const source = join(PROJECT, 'test/fixtures/c/randmap.c')
  await cached(RUNTIME_CACHE, 'randmap-fixed', source, async (into) => {
    await run('gcc', ['-O2', '-no-pie', '-o', join(into, 'randmap'), source])
  })
  return join(RUNTIME_CACHE, 'randmap-fixed/randmap')
}
