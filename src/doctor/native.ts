/** Checks of the native parts: the preload shim, the guard, and what could build them. It only looks for files. */
import { accessSync, constants, existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { CheckResult } from './check.js'

/** Of the package: dist/doctor and src/doctor are equally deep. */
const PACKAGE_ROOT = fileURLToPath(new URL('../..', import.meta.url))

/** Where the package has its compiled parts for this machine. */
export const NATIVE_DIRECTORY = join(PACKAGE_ROOT, 'native/prebuilt', `linux-${process.arch}`)

export function checkShim(directory: string = NATIVE_DIRECTORY): CheckResult {
  const file = join(directory, 'libwarmfork-shim.so')
  if (existsSync(file)) return { name: 'preload shim', status: 'ok', found: 'built' }
  return {
    name: 'preload shim',
    status: 'warn',
    found: `${file} is missing`,
    cost: 'Node 22 and newer cannot be forked, and memory of jemalloc programs is copied at each fork',
    remedy: buildRemedy(),
  }
}

export function checkGuard(directory: string = NATIVE_DIRECTORY): CheckResult {
  const file = join(directory, 'warmfork-guard')
  if (existsSync(file)) return { name: 'guard', status: 'ok', found: 'built' }
  return {
    name: 'guard',
    status: 'fail',
    found: `${file} is missing`,
    cost: 'no fork: nothing would end the children of a supervisor that is killed',
    remedy: buildRemedy(),
  }
}

export function checkInit(directory: string = NATIVE_DIRECTORY): CheckResult {
  const file = join(directory, 'warmfork-init')
  if (existsSync(file)) return { name: 'init', status: 'ok', found: 'built' }
  return {
    name: 'init',
    status: 'warn',
    found: `${file} is missing`,
    cost: "no forks with `identity: 'namespace'`",
    remedy: buildRemedy(),
  }
}

function buildRemedy(): string {
  return existsSync(join(PACKAGE_ROOT, 'scripts/build-native.mjs'))
    ? 'Install a C compiler (gcc, libc6-dev), then `node scripts/build-native.mjs`.'
    : 'Install the package again; its native parts are for x64 Linux.'
}

/** Only a clone needs one: the package brings its native parts. */
export function checkCompiler(): CheckResult | undefined {
  if (!existsSync(join(PACKAGE_ROOT, 'scripts/build-native.mjs'))) return undefined
  const compiler = ['cc', 'gcc', 'clang'].map(findInPath).find((path) => path !== undefined)
  if (compiler) return { name: 'compiler', status: 'ok', found: compiler }
  return {
    name: 'compiler',
    status: 'warn',
    found: 'none',
    cost: 'the native parts cannot be built from source',
    remedy: 'apt-get install gcc libc6-dev',
  }
}

function findInPath(name: string): string | undefined {
  const candidates = (process.env.PATH ?? '')
    .split(':')
    .filter(Boolean)
    .map((directory) => join(directory, name))
  return candidates.find((path) => {
    try {
      accessSync(path, constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}
