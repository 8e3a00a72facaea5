/** How much of a generation on disk is its own alone. It reads no image. */
import { lstatSync } from 'node:fs'
import { join } from 'node:path'
import type { Generation } from '../generations/generation.js'

/**
 * Bytes that were written for it, without the page files that it has from those before it by hard links. Its own page files are linked
 * too, as soon as a child of it was checkpointed.
 */
export function ownBytes({ directory, number, manifest }: Generation): number {
  const made = new RegExp(`^memory-${number}\\b`)
  return Object.keys(manifest.files).reduce((sum, name) => {
    const stats = lstatSync(join(directory, name), { throwIfNoEntry: false })
    return stats && (stats.nlink === 1 || made.test(name)) ? sum + stats.blocks * 512 : sum
  }, 0)
}
