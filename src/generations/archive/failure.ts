/** What is said of an archive that is refused. */
import { WarmforkError } from '../../errors.js'

export const TRIED = 'import the archive'

/** The archive is damaged, was tampered with, or is none. */
export function invalid(happened: string, details: { remedy?: string; cause?: unknown } = {}): WarmforkError {
  return new WarmforkError('ARCHIVE_INVALID', { tried: TRIED, happened, ...details })
}
