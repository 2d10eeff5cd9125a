-- A rollout may be paused: since when it is, and for how long it was before. That time does not count towards its deadline.
ALTER TABLE rollouts ADD COLUMN paused_at BIGINT;
ALTER TABLE rollouts ADD COLUMN paused_ms BIGINT NOT NULL DEFAULT 0;

-- How far each region process lets a rollout's machines activate, in thousandths of their ranks.
CREATE TABLE waves (
    rollout BIGINT NOT NULL REFERENCES rollouts (id),
    region TEXT NOT NULL,
    process TEXT NOT NULL,
    open_permille BIGINT NOT NULL,
    opened_at BIGINT NOT NULL,
    PRIMARY KEY (rollout, region, process)
);

-- Where a wave opened, and how far.
ALTER TABLE event_outbox ADD COLUMN region TEXT;
ALTER TABLE event_outbox ADD COLUMN open_permille BIGINT;
ALTER TABLE events ADD COLUMN region TEXT;
ALTER TABLE events ADD COLUMN open_permille BIGINT;

-- The coordinators that have some of an attempt's log, each between two commas.
ALTER TABLE attempts ADD COLUMN log_at TEXT NOT NULL DEFAULT ',';
