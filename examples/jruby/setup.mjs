// Brings JRuby into a directory, once: `node setup.mjs [directory]` prints the path of its `bin/jruby`. It comes from
// Maven Central (32 MB), since Debian's package is a major version behind; maven itself, which brings a Java with it,
// comes from Debian where it is missing. This file knows nothing of warmfork.
import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, renameSync, rmSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

// The last line that runs on Java 17: JRuby 10 needs 21.
const VERSION = '9.4.12.0'
const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..')

function run(command, args, timeoutMs) {
  // What they say goes to stderr: stdout holds the path alone.
  execFileSync(command, args, {
    stdio: ['ignore', 2, 2],
    timeout: timeoutMs,
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
  })
}

function has(program) {
  return (process.env.PATH ?? '').split(':').some((directory) => existsSync(join(directory, program)))
}

/** The path of `bin/jruby` below the directory, downloaded first where it is not there. */
export function jruby(directory = join(root, '.cache')) {
  const home = join(directory, `jruby-${VERSION}`)
  const program = join(home, 'bin', 'jruby')
  if (existsSync(program) && has('java')) return program

  if (!has('mvn') || !has('java')) {
    if (process.getuid?.() !== 0 || !has('apt-get')) {
      throw new Error('JRuby needs Java 17 or newer and, to be downloaded, maven. Install both and try again.')
    }
    run('apt-get', ['update', '-qq'], 300_000)
    run(
      'apt-get',
      ['install', '-qq', '-y', '--no-install-recommends', '-o', 'DPkg::Lock::Timeout=300', 'maven'],
      900_000,
    )
  }
  // Unpacked beside and renamed, so that a run that was cut short leaves nothing that looks whole.
  const partial = join(directory, `jruby-${VERSION}.${process.pid}`)
  mkdirSync(partial, { recursive: true })
  try {
    const artifact = `org.jruby:jruby-dist:${VERSION}:tar.gz:bin`
    run('mvn', ['-q', '-B', 'dependency:copy', `-Dartifact=${artifact}`, `-DoutputDirectory=${partial}`], 600_000)
    run('tar', ['-xzf', join(partial, `jruby-dist-${VERSION}-bin.tar.gz`), '-C', partial], 120_000)
    if (!existsSync(program)) {
      rmSync(home, { recursive: true, force: true })
      renameSync(join(partial, `jruby-${VERSION}`), home)
    }
  } finally {
    rmSync(partial, { recursive: true, force: true })
  }
  return program
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  console.log(jruby(process.argv[2] === undefined ? undefined : resolve(process.argv[2])))
}
