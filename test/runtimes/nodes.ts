import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { RUNTIME_CACHE } from './runtime.js'

/** The Node that runs this, and those that the matrix has brought: names and paths. */
export const NODES: readonly (readonly [name: string, path: string])[] = [
  [process.version, process.execPath] as const,
  ...(existsSync(RUNTIME_CACHE) ? readdirSync(RUNTIME_CACHE) : [])
    .filter((name) => name.startsWith('node-'))
    .map((name) => [name, join(RUNTIME_CACHE, name, 'node_modules/node/bin/node')] as const)
    .filter(([, node]) => existsSync(node)),
]
