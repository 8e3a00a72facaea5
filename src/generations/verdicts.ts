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
const schema = z.strictObject({
  version: z.literal(1),
  pinned: number.nullable(),
  rejected: z.array(rejection),
  approved: z.array(number),
})
type Content = Omit<z.infer<typeof schema>, 'version'>

/** A generation that is never chosen again. */
export type Rejection = z.infer<typeof rejection>

/** How many verdicts of a kind are remembered: numbers are never given again, and the generations themselves are pruned. */
const MOST = 1_000

export class Verdicts {
  #content: Content
  #saving: Promise<void> = Promise.resolve()

  private constructor(
    readonly path: string,
    content: Content,
  ) {
    this.#content = content
  }

  /** Reads those of a store; none where there is no file. @throws GENERATION_CORRUPT, STORE_UNWRITABLE */
  static read(storeDirectory: string): Verdicts {
    const path = join(storeDirectory, VERDICTS_FILE)
    const tried = `read what was decided about generations, ${path}`
    let text: string
    try {
      text = readFileSync(path, 'utf8')
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return new Verdicts(path, { pinned: null, rejected: [], approved: [] })
      throw storeError(error, tried)
    }
    try {
      const { version: _, ...content } = schema.parse(JSON.parse(text))
      return new Verdicts(path, content)
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
    return this.#content.pinned ?? undefined
  }

  get rejected(): readonly Rejection[] {
    return this.#content.rejected
  }

  /** Why a generation may not be chosen; undefined where it may. */
  whyNot(number: number): string | undefined {
    return this.#content.rejected.find((one) => one.number === number)?.reason
  }

  /**
   * Whether it passed its trial. One that a refork made and that did not, since the supervisor was killed before, has to be tried
   * before it is used.
   */
  isApproved(number: number): boolean {
    return this.#content.approved.includes(number)
  }

  async pin(number: number | undefined): Promise<void> {
    await this.#save({ ...this.#content, pinned: number ?? null })
  }

  async approve(number: number): Promise<void> {
    const { approved } = this.#content
    if (!approved.includes(number)) await this.#save({ ...this.#content, approved: [...approved, number].slice(-MOST) })
  }

  async reject(number: number, reason: string): Promise<void> {
    const { pinned, rejected, approved } = this.#content
    const others = rejected.filter((one) => one.number !== number)
    await this.#save({
      pinned: pinned === number ? null : pinned,
      rejected: [...others, { number, reason, at: new Date().toISOString() }].slice(-MOST),
      approved: approved.filter((one) => one !== number),
    })
  }

  /** One after the other, each whole. @throws DISK_FULL, STORE_UNWRITABLE, STORE_GONE */
  #save(content: Content): Promise<void> {
    this.#content = content
    const saved = this.#saving.then(async () => {
      const temporary = `${this.path}.new`
      try {
        await writeFile(temporary, `${JSON.stringify({ version: 1, ...content }, null, 2)}\n`, { mode: 0o600 })
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
