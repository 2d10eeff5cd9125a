-- The queue: priorities, back-off, one build of a commit at a time, workers, and its pause.

-- 0 urgent, 1 high, 2 normal, 3 low.
ALTER TABLE jobs ADD COLUMN priority BIGINT NOT NULL DEFAULT 2;
-- Since when it waits for a worker, or from when on it will.
ALTER TABLE jobs ADD COLUMN eligible_at BIGINT NOT NULL DEFAULT 0;
-- Whether it waits for that time: then claimants do not see it.
ALTER TABLE jobs ADD COLUMN deferred BIGINT NOT NULL DEFAULT 0;
UPDATE jobs SET eligible_at = created_at;

-- Of jobs that build the same commit one goes on: one that runs, else the oldest.
UPDATE jobs SET status = 'CANCELLED', finished_at = created_at, cancel_requested = 1, cancelled_by = 'coordinator',
    reason = 'cancelled by coordinator: another job builds the same commit'
WHERE status = 'QUEUED' AND EXISTS (
    SELECT 1 FROM jobs other WHERE other.app = jobs.app AND other.commit_sha = jobs.commit_sha
        AND (other.status = 'RUNNING' OR (other.status = 'QUEUED' AND other.id < jobs.id)));
UPDATE jobs SET cancel_requested = 1, cancelled_by = 'coordinator'
WHERE status = 'RUNNING' AND EXISTS (
    SELECT 1 FROM jobs other WHERE other.app = jobs.app AND other.commit_sha = jobs.commit_sha
        AND other.status = 'RUNNING' AND other.id < jobs.id);

-- History is long, and what waits or runs is little: indexes of that alone. The first is what a claim probes.
DROP INDEX jobs_waiting;
DROP INDEX jobs_by_status;
CREATE INDEX jobs_ready ON jobs (priority, created_at, id) WHERE status = 'QUEUED' AND deferred = 0;
CREATE INDEX jobs_deferred ON jobs (eligible_at) WHERE status = 'QUEUED' AND deferred = 1;
CREATE INDEX jobs_running ON jobs (id) WHERE status = 'RUNNING';
-- One build of a commit at a time; one that is being cancelled is in nobody's way.
CREATE UNIQUE INDEX jobs_open ON jobs (app, commit_sha)
    WHERE status IN ('QUEUED', 'RUNNING') AND cancel_requested = 0;

-- Workers by the names of their certificates, and the process that has the name at present.
CREATE TABLE workers (
    name TEXT NOT NULL PRIMARY KEY,
    incarnation TEXT NOT NULL,
    host TEXT NOT NULL,
    started_at BIGINT NOT NULL,
    last_seen BIGINT NOT NULL,
    -- Takes no job any more.
    drained BIGINT NOT NULL,
    drain_reason TEXT,
    drained_by TEXT,
    drained_at BIGINT
);

-- Processes that had the name before: what they still send is late.
CREATE TABLE past_workers (
    name TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    ended_at BIGINT NOT NULL,
    PRIMARY KEY (name, incarnation)
);

-- While the queue is paused it has one row, and nobody takes a job.
CREATE TABLE pauses (
    id BIGINT NOT NULL PRIMARY KEY,
    reason TEXT,
    paused_by TEXT NOT NULL,
    paused_at BIGINT NOT NULL
);
