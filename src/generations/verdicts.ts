/**
 * What was decided about generations, beside them: which one is pinned, and which may not be chosen again and why. Generations are
 * immutable; this one file of a store is not, and outlives the supervisor. It knows numbers, and nothing of what they stand for.
 */
import { readFileSync } from 'node:fs'
import { rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { errnoOf, WarmforkError } from '../errors.js'
import { storeError, sync } from './directories.js'

export const VERDICTS_FILE = 'verdicts.json'

const number = z.int().positive()
const rejection = z.strictObject({ number, reason: z.string(), at: z.iso.datetime() })
const schema = z.strictObject({ version: z.literal(1), pinned: number.nullable(), rejected: z.array(rejection) })

/** A generation that is never chosen again. */
export type Rejection = z.infer<typeof rejection>

/** How many rejections are remembered: their numbers are never given again, and the generations themselves are pruned. */
const MOST_REJECTIONS = 1_000

export class Verdicts {
  #pinned: number | null
  #rejected: readonly Rejection[]
  #saving: Promise<void> = Promise.resolve()

  private constructor(
    readonly path: string,
    { pinned, rejected }: { pinned: number | null; rejected: readonly Rejection[] },
  ) {
    this.#pinned = pinned
    this.#rejected = rejected
  }

  /** Reads those of a store; none where there is no file. @throws STORE_CORRUPT-like BAD content as GENERATION_CORRUPT, STORE_UNWRITABLE */
  static read(storeDirectory: string): Verdicts {
    const path = join(storeDirectory, VERDICTS_FILE)
    const tried = `read what was decided about generations, ${path}`
    let text: string
    try {
      text = readFileSync(path, 'utf8')
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return new Verdicts(path, { pinned: null, rejected: [] })
      throw storeError(error, tried)
    }
    try {
      return new Verdicts(path, schema.parse(JSON.parse(text)))
    } catch (cause) {
      // To go on without would bring back a generation that was found to be bad.
      throw new WarmforkError('GENERATION_CORRUPT', {
        tried,
        happened: 'it is not what warmfork wrote there',
        remedy: 'Remove the file: no generation is pinned or rejected then. Or give another store or name.',
        cause,
      })
    }
  }

  /** The number of the one that forks come from until it is unpinned. */
  get pinned(): number | undefined {
    return this.#pinned ?? undefined
  }

  get rejected(): readonly Rejection[] {
    return this.#rejected
  }

  /** Why a generation may not be chosen; undefined where it may. */
  whyNot(number: number): string | undefined {
    return this.#rejected.find((one) => one.number === number)?.reason
  }

  async pin(number: number | undefined): Promise<void> {
    this.#pinned = number ?? null
    await this.#save()
  }

  async reject(number: number, reason: string): Promise<void> {
    const others = this.#rejected.filter((one) => one.number !== number)
    this.#rejected = [...others, { number, reason, at: new Date().toISOString() }].slice(-MOST_REJECTIONS)
    if (this.#pinned === number) this.#pinned = null
    await this.#save()
  }

  /** One after the other, each whole. @throws DISK_FULL, STORE_UNWRITABLE, STORE_GONE */
  #save(): Promise<void> {
    const saved = this.#saving.then(async () => {
      const temporary = `${this.path}.new`
      const content = { version: 1, pinned: this.#pinned, rejected: this.#rejected }
      try {
        await writeFile(temporary, `${JSON.stringify(content, null, 2)}\n`, { mode: 0o600 })
        await sync(temporary)
        await rename(temporary, this.path)
      } catch (error) {
        await rm(temporary, { force: true }).catch(() => undefined)
        throw storeError(error, `write down what was decided about generations, ${this.path}`)
      }
    })
    this.#saving = saved.catch(() => undefined)
    return saved
  }
}
