/**
 * Protocol buffer messages as plain objects, by small tables of fields. A message keeps what its table does not name
 * (`unknown`), so that decoding and encoding again gives the same bytes: CRIU adds fields with every version, and an
 * image must survive an edit of the fields beside them. Enums are read as int32: a required enum of unknown value makes
 * generated code throw. Varints and tags come from @bufbuild/protobuf.
 */
import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire'

export type Scalar = 'uint32' | 'int32' | 'sint32' | 'uint64' | 'sint64' | 'bool' | 'enum' | 'string' | 'bytes'
type FieldType = Scalar | Message<Fields>

export interface Field<
  T extends FieldType = FieldType,
  R extends 'required' | 'optional' | 'repeated' = 'required' | 'optional' | 'repeated',
> {
  readonly number: number
  readonly type: T
  readonly rule: R
}

export type Fields = Readonly<Record<string, Field>>

/** A field that stands in no table: its number, its wire type and its value, bytes where it is length-delimited. */
export interface UnknownField {
  readonly number: number
  readonly wireType: WireType
  readonly value: bigint | Uint8Array
}

interface ScalarTypes {
  uint32: number
  int32: number
  sint32: number
  uint64: bigint
  sint64: bigint
  bool: boolean
  enum: number
  string: string
  bytes: Uint8Array
}

type Value<T extends FieldType> = T extends Scalar ? ScalarTypes[T] : T extends Message<infer F> ? Decoded<F> : never

export type Decoded<F extends Fields> = {
  -readonly [K in keyof F as F[K] extends Field<FieldType, 'optional'> ? never : K]: F[K] extends Field<
    infer T,
    'repeated'
  >
    ? Value<T>[]
    : Value<F[K]['type']>
} & {
  -readonly [K in keyof F as F[K] extends Field<FieldType, 'optional'> ? K : never]?: Value<F[K]['type']> | undefined
} & { unknown?: UnknownField[] }

export interface Message<F extends Fields> {
  readonly fields: F
  readonly byNumber: ReadonlyMap<number, { name: string; field: Field }>
}

/** What a message of this table decodes to. */
export type MessageOf<M> = M extends Message<infer F> ? Decoded<F> : never

export const required = <T extends FieldType>(number: number, type: T): Field<T, 'required'> => ({
  number,
  type,
  rule: 'required',
})
export const optional = <T extends FieldType>(number: number, type: T): Field<T, 'optional'> => ({
  number,
  type,
  rule: 'optional',
})
export const repeated = <T extends FieldType>(number: number, type: T): Field<T, 'repeated'> => ({
  number,
  type,
  rule: 'repeated',
})

export function message<F extends Fields>(fields: F): Message<F> {
  const sorted = Object.entries(fields).sort(([, a], [, b]) => a.number - b.number)
  return { fields, byNumber: new Map(sorted.map(([name, field]) => [field.number, { name, field }])) }
}

/** A message of which no field is known: every field lands in `unknown`. */
export const OPAQUE = message({})

export class DecodeError extends Error {
  override readonly name = 'DecodeError'
}

/**
 * Decodes a message. Throws DecodeError where the bytes are no message, end too early, lack a required field or give a
 * field another wire type than its table.
 */
export function decode<F extends Fields>(schema: Message<F>, bytes: Uint8Array): Decoded<F> {
  const found: Record<string, unknown> = {}
  for (const [name, field] of Object.entries(schema.fields)) if (field.rule === 'repeated') found[name] = []
  const reader = new BinaryReader(bytes)
  try {
    while (reader.pos < reader.len) {
      const [number, wireType] = reader.tag()
      const known = schema.byNumber.get(number)
      if (!known) {
        found.unknown ??= []
        ;(found.unknown as UnknownField[]).push({ number, wireType, value: readUnknown(reader, wireType) })
        continue
      }
      const { name, field } = known
      if (wireType !== wireTypeOf(field.type)) throw new DecodeError(`field ${name} has wire type ${wireType}`)
      const value = readValue(reader, field.type)
      if (field.rule === 'repeated') (found[name] as unknown[]).push(value)
      else found[name] = value
    }
  } catch (cause) {
    if (cause instanceof DecodeError) throw cause
    throw new DecodeError('bytes are no message, or end too early', { cause })
  }
  for (const [name, field] of Object.entries(schema.fields)) {
    if (field.rule === 'required' && found[name] === undefined)
      throw new DecodeError(`required field ${name} is missing`)
  }
  return found as Decoded<F>
}

/** Encodes in ascending order of field numbers, as protobuf-c does. */
export function encode<F extends Fields>(schema: Message<F>, value: Decoded<F>): Uint8Array {
  const writer = new BinaryWriter()
  const unknown = (value.unknown ?? []).map((entry, index) => ({ entry, index }))
  unknown.sort((a, b) => a.entry.number - b.entry.number || a.index - b.index)
  let next = 0
  const writeUnknownBelow = (limit: number) => {
    while (next < unknown.length && unknown[next]!.entry.number < limit) writeUnknown(writer, unknown[next++]!.entry)
  }
  for (const [number, { name, field }] of schema.byNumber) {
    writeUnknownBelow(number)
    const found = (value as Record<string, unknown>)[name]
    if (found === undefined) {
      if (field.rule === 'required') throw new TypeError(`required field ${name} is missing`)
      continue
    }
    for (const one of field.rule === 'repeated' ? (found as unknown[]) : [found]) {
      writer.tag(number, wireTypeOf(field.type))
      writeValue(writer, field.type, one)
    }
  }
  writeUnknownBelow(Number.POSITIVE_INFINITY)
  return writer.finish()
}

function wireTypeOf(type: FieldType): WireType {
  return type === 'string' || type === 'bytes' || typeof type === 'object' ? WireType.LengthDelimited : WireType.Varint
}

function readValue(reader: BinaryReader, type: FieldType): unknown {
  if (typeof type === 'object') return decode(type, reader.bytes())
  switch (type) {
    case 'uint32':
      return reader.uint32()
    case 'int32':
    case 'enum':
      return reader.int32()
    case 'sint32':
      return reader.sint32()
    case 'uint64':
      return BigInt(reader.uint64())
    case 'sint64':
      return BigInt(reader.sint64())
    case 'bool':
      return reader.bool()
    case 'string':
      return textOf(reader.bytes())
    case 'bytes':
      return reader.bytes()
  }
}

function writeValue(writer: BinaryWriter, type: FieldType, value: unknown): void {
  if (typeof type === 'object') {
    writer.bytes(encode(type, value as Decoded<Fields>))
    return
  }
  switch (type) {
    case 'uint32':
      writer.uint32(value as number)
      return
    case 'int32':
    case 'enum':
      writer.int32(value as number)
      return
    case 'sint32':
      writer.sint32(value as number)
      return
    case 'uint64':
      writer.uint64(value as bigint)
      return
    case 'sint64':
      writer.sint64(value as bigint)
      return
    case 'bool':
      writer.bool(value as boolean)
      return
    case 'string':
      writer.bytes(bytesOf(value as string))
      return
    case 'bytes':
      writer.bytes(value as Uint8Array)
      return
  }
}

function readUnknown(reader: BinaryReader, wireType: WireType): bigint | Uint8Array {
  switch (wireType) {
    case WireType.Varint:
      return BigInt(reader.uint64())
    case WireType.LengthDelimited:
      return reader.bytes()
    case WireType.Bit64:
      return BigInt(reader.fixed64())
    case WireType.Bit32:
      return BigInt(reader.fixed32())
    default:
      throw new DecodeError(`wire type ${wireType}`)
  }
}

function writeUnknown(writer: BinaryWriter, { number, wireType, value }: UnknownField): void {
  writer.tag(number, wireType)
  if (wireType === WireType.LengthDelimited) writer.bytes(value as Uint8Array)
  else if (wireType === WireType.Varint) writer.uint64(value as bigint)
  else if (wireType === WireType.Bit64) writer.fixed64(value as bigint)
  else writer.fixed32(Number(value))
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/**
 * Text of an image: paths and names need not be UTF-8. Bytes that are not stand as U+DC80 to U+DCFF, one each (as
 * Python's surrogateescape does), so that `bytesOf` gives the same bytes back.
 */
export function textOf(bytes: Uint8Array): string {
  try {
    return utf8.decode(bytes)
  } catch {
    let text = ''
    for (let at = 0; at < bytes.length; ) {
      const length = validSequenceLength(bytes, at)
      text += length > 0 ? utf8.decode(bytes.subarray(at, at + length)) : String.fromCharCode(0xdc00 + bytes[at]!)
      at += Math.max(1, length)
    }
    return text
  }
}

export function bytesOf(text: string): Uint8Array {
  if (!/[\udc80-\udcff]/.test(text)) return Buffer.from(text, 'utf8')
  const parts: Buffer[] = []
  for (const char of text) {
    const code = char.charCodeAt(0)
    const escaped = char.length === 1 && code >= 0xdc80 && code <= 0xdcff
    parts.push(escaped ? Buffer.of(code - 0xdc00) : Buffer.from(char, 'utf8'))
  }
  return Buffer.concat(parts)
}

/** Length of the valid UTF-8 sequence at an offset, 0 where there is none. */
function validSequenceLength(bytes: Uint8Array, at: number): number {
  const first = bytes[at]!
  const length =
    first < 0x80
      ? 1
      : first >= 0xc2 && first < 0xe0
        ? 2
        : first >= 0xe0 && first < 0xf0
          ? 3
          : first >= 0xf0 && first < 0xf5
            ? 4
            : 0
  if (length === 0 || at + length > bytes.length) return 0
  try {
    utf8.decode(bytes.subarray(at, at + length))
    return length
  } catch {
    return 0
  }
}
