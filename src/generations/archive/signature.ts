/** Signatures of archives: ed25519 over the digest. The public key comes with it, so that one that does not fit is seen by who asks for no particular key, too. It knows nothing of archives but their digests. */
import { createHash, createPrivateKey, createPublicKey, type KeyObject, sign, verify } from 'node:crypto'
import { z } from 'zod'
import { WarmforkError } from '../../errors.js'
import { canonical } from '../manifest.js'
import { invalid } from './failure.js'

export const MAX_SIGNATURE_BYTES = 4096

const base64 = z.string().regex(/^[A-Za-z0-9+/]+={0,2}$/)
const schema = z.strictObject({ algorithm: z.literal('ed25519'), publicKey: base64, signature: base64 })

/** Nothing else that the key may sign begins so. */
const signedText = (digest: string) => Buffer.from(`warmfork archive ${digest}\n`)

/** A name for a pair of keys: SHA-256 of the public one's DER form. */
export function keyName(key: KeyObject): string {
  return `sha256:${createHash('sha256').update(der(key)).digest('hex')}`
}

/** A private ed25519 key of a PEM text. Throws BAD_OPTION. */
export function privateKey(pem: string | Buffer | KeyObject): KeyObject {
  return ed25519('sign', () => (isKey(pem) ? pem : createPrivateKey(pem)))
}

/** A public ed25519 key of a PEM text. Throws BAD_OPTION. */
export function publicKey(pem: string | Buffer | KeyObject): KeyObject {
  return ed25519('verify', () => (isKey(pem) && pem.type === 'public' ? pem : createPublicKey(pem as string)))
}

export function encodeSignature(digest: string, key: KeyObject): Buffer {
  const publicPart = der(key).toString('base64')
  const signature = sign(null, signedText(digest), key).toString('base64')
  return Buffer.from(canonical({ algorithm: 'ed25519', publicKey: publicPart, signature }))
}

/** The key that signed. Throws ARCHIVE_INVALID where the signature is not one of this digest. */
export function readSignature(text: Buffer, digest: string): KeyObject {
  try {
    const parsed = schema.parse(JSON.parse(text.toString('utf8')))
    if (!Buffer.from(canonical(parsed)).equals(text)) throw new Error('it is not written in the canonical form')
    const key = createPublicKey({ key: Buffer.from(parsed.publicKey, 'base64'), format: 'der', type: 'spki' })
    const signature = Buffer.from(parsed.signature, 'base64')
    // Base64 has bits that mean nothing.
    const exact = der(key).toString('base64') === parsed.publicKey && signature.toString('base64') === parsed.signature
    if (exact && key.asymmetricKeyType === 'ed25519' && verify(null, signedText(digest), key, signature)) return key
  } catch (cause) {
    throw invalid('its signature is damaged', { cause })
  }
  throw invalid('its signature is not one of its list')
}

function ed25519(option: string, read: () => KeyObject): KeyObject {
  const wrong = (happened: string, cause?: unknown) =>
    new WarmforkError('BAD_OPTION', {
      tried: `read the key of \`${option}\``,
      happened,
      remedy:
        'Make a pair with `openssl genpkey -algorithm ed25519 -out key.pem` and `openssl pkey -in key.pem -pubout -out pub.pem`.',
      cause,
    })
  let key: KeyObject
  try {
    key = read()
  } catch (cause) {
    throw wrong('it is no key in the PEM format', cause)
  }
  if (key.asymmetricKeyType !== 'ed25519') throw wrong(`expected an ed25519 key, got ${key.asymmetricKeyType}`)
  return key
}

function isKey(key: string | Buffer | KeyObject): key is KeyObject {
  return typeof key === 'object' && 'asymmetricKeyType' in key
}

function der(key: KeyObject): Buffer {
  return (key.type === 'private' ? createPublicKey(key) : key).export({ type: 'spki', format: 'der' })
}
