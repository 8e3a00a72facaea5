/**
 * New state for what Node draws random values from and keeps in memory. Each thread has its own. It knows nothing of forks: it is
 * told when everything must be new.
 */
import crypto = require('node:crypto')

/** Node fetches so many UUIDs' and integers' bytes at once (lib/internal/crypto/random.js), and hands them out one by one. */
const UUIDS_AT_ONCE = 128
const INTEGERS_AT_ONCE = 1024

/** sfc32 (PractRand): four words of state, fast in plain JavaScript, of good quality. */
class Generator {
  #a = 0
  #b = 0
  #c = 0
  #counter = 0

  constructor() {
    this.seed()
  }

  seed(): void {
    const words = crypto.randomFillSync(new Int32Array(4))
    ;[this.#a, this.#b, this.#c, this.#counter] = words as unknown as [number, number, number, number]
    for (let i = 0; i < 12; i++) this.#word()
  }

  #word(): number {
    const result = (((this.#a + this.#b) | 0) + this.#counter) | 0
    this.#counter = (this.#counter + 1) | 0
    this.#a = this.#b ^ (this.#b >>> 9)
    this.#b = (this.#c + (this.#c << 3)) | 0
    this.#c = (this.#c << 21) | (this.#c >>> 11)
    this.#c = (this.#c + result) | 0
    return result
  }

  /** In [0, 1), with 53 bits, as Math.random has. */
  next(): number {
    return ((this.#word() >>> 5) * 0x4000000 + (this.#word() >>> 6)) / 0x20000000000000
  }
}

let generator: Generator | undefined

/**
 * V8 keeps the state of Math.random, and 64 values ahead, where nobody can reach them: so it is replaced, before the program takes a
 * reference to it. Contexts of `vm` have one of their own, which is not.
 */
function replaceMathRandom(): void {
  const own = new Generator()
  generator = own
  const random = () => own.next()
  Object.defineProperty(random, 'name', { value: 'random' })
  Math.random = random
}

/** Afterwards nothing that is drawn was, or could be, drawn elsewhere. OpenSSL sees by itself that its process id is another. */
function renew(): void {
  generator?.seed()
  for (let i = 0; i < UUIDS_AT_ONCE; i++) crypto.randomUUID()
  for (let i = 0; i < INTEGERS_AT_ONCE; i++) crypto.randomInt(1, 3)
}

export = { replaceMathRandom, renew }
