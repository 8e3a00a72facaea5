/** The public API: re-exports only. */
export {
  type Compression,
  type ExportedGeneration,
  type ExportOptions,
  exportGeneration,
  type ImportedGeneration,
  type ImportOptions,
  importGeneration,
} from './archive.js'
export { Child, type ChildEvents, type ChildState, type ChildStats, type EndOptions } from './child.js'
export type { DescriptorKind, DescriptorPolicy } from './descriptors/kinds.js'
export type { DescriptorPolicies } from './descriptors/policies.js'
export type { EngineName, GenerationInfo, IdentityMode, MemoryMode } from './engines/engine.js'
export { ERROR_CODES, type ErrorCode, type ErrorDetails, WarmforkError } from './errors.js'
export type { ForkRequest } from './fork-request.js'
export type { ExitStatus } from './linux/reaper.js'
export type {
  CanaryOptions,
  CrashOptions,
  LogLevel,
  PoolOptions,
  ReadyByDelay,
  ReadyByFile,
  ReadyByFunction,
  ReadyByHttp,
  ReadyByIdleness,
  ReadyByOutput,
  ReadyByPort,
  ReadyFunction,
  ReadyOption,
  ReuseOptions,
  StdioOption,
  SupervisorOptions,
  TemplateOptions,
  TemplateView,
  TrialCheck,
  TrialOptions,
  WarmupByCommand,
  WarmupByFunction,
  WarmupByHttp,
  WarmupFunction,
  WarmupOption,
  WorkerOptions,
} from './options.js'
export type { PoolState } from './pool.js'
export type { LastRefork, ReforkOptions, RollbackOptions } from './refork/changes.js'
export type { ObservedChild, ReforkDecision, ReforkObservation } from './refork/observation.js'
export type { ReforkFunction, ReforkSetting, ReforkThresholds, ReforkVerdict } from './refork/policy.js'
export type { Refork } from './refork/refork.js'
export {
  type StartOptions,
  type StartPhase,
  type StopOptions,
  Supervisor,
  type SupervisorEvents,
  type SupervisorState,
  type SupervisorStats,
  type TemplateState,
  type Warning,
} from './supervisor.js'
export type { Terminal, TerminalSize } from './terminal.js'
