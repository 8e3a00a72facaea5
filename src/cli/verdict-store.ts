/** The verdicts of a supervisor that does not run, to be changed: nobody can start it meanwhile. */
import { WarmforkError } from '../errors.js'
import { Store } from '../generations/store.js'
import { Verdicts } from '../generations/verdicts.js'
import type { StoreAddress } from './store-address.js'

/** @throws STORE_LOCKED where one runs, GENERATION_NOT_FOUND where there is no such store */
export async function withVerdicts<T>(
  { root, name }: StoreAddress,
  tried: string,
  work: (store: Store, verdicts: Verdicts) => Promise<T>,
): Promise<T> {
  if (!(await Store.names(root)).includes(name)) {
    throw new WarmforkError('GENERATION_NOT_FOUND', { tried, happened: `there is no store of ${name} in ${root}` })
  }
  await using store = await Store.open({ root, name, access: 'exclusive' })
  return await work(store, Verdicts.read(store.directory))
}
