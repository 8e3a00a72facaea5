/** How this folder reports an image that it cannot use: always with the file's name and a code, before anything is written. */
import { WarmforkError } from '../errors.js'

export function truncated(file: string, what: string, cause?: unknown): WarmforkError {
  return new WarmforkError('IMAGE_TRUNCATED', { tried: `read ${file}`, happened: what, cause })
}

export function corrupt(file: string, what: string, cause?: unknown): WarmforkError {
  return new WarmforkError('IMAGE_CORRUPT', { tried: `read ${file}`, happened: what, cause })
}

export function unsupported(tried: string, happened: string, remedy?: string): WarmforkError {
  return new WarmforkError('IMAGE_UNSUPPORTED', { tried, happened, ...(remedy === undefined ? {} : { remedy }) })
}
