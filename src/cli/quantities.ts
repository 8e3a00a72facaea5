/** Times and amounts of memory as people write and read them. */
import { InvalidArgumentError } from 'commander'

const UNIT_MS = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 } as const

/** Milliseconds of `500ms`, `10s`, `1.5m`, `2h`, `7d`, `0`. Throws InvalidArgumentError. */
export function parseDuration(text: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h|d)$/.exec(text)
  if (match) return Number(match[1]) * UNIT_MS[match[2] as keyof typeof UNIT_MS]
  if (text === '0') return 0
  throw new InvalidArgumentError('Write a time as `500ms`, `10s`, `5m`, `2h` or `7d`.')
}

/** Whole numbers from 0 on. Throws InvalidArgumentError. */
export function parseCount(text: string): number {
  if (/^\d{1,9}$/.test(text)) return Number(text)
  throw new InvalidArgumentError('Write a whole number.')
}

/** Numbers of generations, from 1 on. Throws InvalidArgumentError. */
export function parseNumber(text: string): number {
  if (/^[1-9]\d{0,8}$/.test(text)) return Number(text)
  throw new InvalidArgumentError('Write the number of a generation: 1, 2, 3 …')
}

/** A time span in its largest units, two digits at least: `350ms`, `2.1s`, `59s`, `5m`, `3h`, `12d`. */
export function formatDuration(ms: number): string {
  if (ms < 1_000) return `${Math.round(ms)}ms`
  if (ms < 10_000) return `${(ms / 1_000).toFixed(1)}s`
  if (ms < 100_000) return `${Math.round(ms / 1_000)}s`
  if (ms < 100 * 60_000) return `${Math.round(ms / 60_000)}m`
  if (ms < 48 * 3_600_000) return `${Math.round(ms / 3_600_000)}h`
  return `${Math.round(ms / 86_400_000)}d`
}

/** Always in MiB, so that a column of them compares at a glance: `0.1`, `24.3`, `490`. */
export function formatMiB(bytes: number): string {
  const mib = bytes / (1024 * 1024)
  return mib < 100 ? mib.toFixed(1) : mib.toFixed(0)
}
