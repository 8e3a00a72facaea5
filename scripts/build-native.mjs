/**
 * Builds the native parts, the preload shim and the guard, into `native/prebuilt/linux-x64/`. It needs a C compiler
 * (cc or gcc) and nothing else: neither part uses a library, and nothing comes from the network. What is newer than its
 * sources is left as it is; an output appears whole, by rename, so that a running build never shows half a file.
 */
import { spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, renameSync, rmSync, statSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const quiet = process.argv.includes('--quiet')
const force = process.argv.includes('--force')
const COMPILE_TIMEOUT_MS = 60_000

/** No loop of ours may become a call of memset or memcpy: there is no libc to have them. */
const FREESTANDING = [
  '-O2',
  '-g0',
  '-std=gnu11',
  '-Wall',
  '-Wextra',
  '-Werror',
  '-nostdlib',
  '-ffreestanding',
  '-fno-builtin',
  '-fno-stack-protector',
  '-fno-tree-loop-distribute-patterns',
  '-fvisibility=hidden',
  '-Wl,--build-id=none',
  '-Wl,-z,noexecstack',
  '-Wl,-z,noseparate-code',
  '-s',
]

const targets = [
  {
    output: 'libwarmfork-shim.so',
    sources: ['src/shim/shim.c', 'src/shim/syscall.h'],
    flags: ['-fPIC', '-shared', '-Wl,-z,now', '-Wl,-z,relro', '-Wl,--hash-style=both'],
  },
  {
    output: 'warmfork-guard',
    sources: ['src/guard/guard.c', 'src/shim/syscall.h'],
    flags: ['-static', '-fno-pie', '-no-pie', '-fno-asynchronous-unwind-tables'],
  },
  {
    output: 'warmfork-init',
    sources: ['src/engines/criu/init.c', 'src/shim/syscall.h'],
    flags: ['-static', '-fno-pie', '-no-pie', '-fno-asynchronous-unwind-tables'],
  },
  {
    // The demo's yardstick is an ordinary program: it may use the C library.
    output: 'warmfork-fork2',
    sources: ['src/demo/fork2.c'],
    flags: ['-O2', '-Wall', '-Wextra', '-Werror', '-s'],
    hosted: true,
  },
]

function say(text) {
  if (!quiet) console.log(text)
}

function findCompiler() {
  for (const name of [process.env.CC, 'cc', 'gcc', 'clang']) {
    if (!name) continue
    const found = spawnSync(name, ['--version'], { timeout: COMPILE_TIMEOUT_MS, stdio: 'ignore' })
    if (found.status === 0) return name
  }
  return undefined
}

function isFresh(target, path) {
  if (force || !existsSync(path)) return false
  const built = statSync(path).mtimeMs
  // An installed package has no sources in C: what was prebuilt is what there is.
  return target.sources.every((source) => {
    const file = join(root, source)
    return !existsSync(file) || statSync(file).mtimeMs <= built
  })
}

function compile(compiler, target, path) {
  const temporary = `${path}.${process.pid}.tmp`
  const args = [...(target.hosted ? [] : FREESTANDING), ...target.flags, '-o', temporary, join(root, target.sources[0])]
  const run = spawnSync(compiler, args, { timeout: COMPILE_TIMEOUT_MS, encoding: 'utf8' })
  if (run.status !== 0) {
    rmSync(temporary, { force: true })
    const words = run.error ? run.error.message : run.stderr.trim()
    throw new Error(`could not build ${target.output} with ${compiler}: ${words}`)
  }
  chmodSync(temporary, 0o755)
  renameSync(temporary, path)
}

function main() {
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    say(
      `The native parts exist for Linux on x64 only; on ${process.platform}-${process.arch} programs are started cold.`,
    )
    return 0
  }
  const directory = join(root, 'native/prebuilt/linux-x64')
  const stale = targets.filter((target) => !isFresh(target, join(directory, target.output)))
  if (stale.length === 0) return 0
  const compiler = findCompiler()
  if (!compiler) {
    const missing = targets.filter((target) => !existsSync(join(directory, target.output)))
    const names = (missing.length > 0 ? missing : stale).map((target) => target.output).join(' and ')
    if (missing.length === 0) {
      console.warn(`warning: no C compiler was found; ${names} may be older than the sources.`)
      return 0
    }
    console.error(`error: no C compiler was found to build ${names}. Install one: apt-get install gcc`)
    return 1
  }
  mkdirSync(directory, { recursive: true })
  for (const target of stale) {
    const path = join(directory, target.output)
    try {
      compile(compiler, target, path)
    } catch (error) {
      console.error(`error: ${error.message}`)
      return 1
    }
    say(`${relative(root, path)}: ${statSync(path).size} bytes`)
  }
  return 0
}

process.exitCode = main()
