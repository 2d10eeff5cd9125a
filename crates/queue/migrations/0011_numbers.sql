-- For PostgreSQL alone: numbers that rise without a row that is locked to the end of each transaction. With that row
-- all changes that are audited went one after the other, each waiting for the sync of the one before.
--
-- What a reader follows by a cursor keeps its counter: there the order of the numbers must be that of the commits. The
-- counter 'job' stays as the lock of those who look before they add a job.

CREATE SEQUENCE audit_numbers;
SELECT setval('audit_numbers', (SELECT value + 1 FROM counters WHERE name = 'audit'), false);
CREATE SEQUENCE job_numbers;
SELECT setval('job_numbers', (SELECT value + 1 FROM counters WHERE name = 'job'), false);
CREATE SEQUENCE rollout_numbers;
SELECT setval('rollout_numbers', (SELECT value + 1 FROM counters WHERE name = 'rollout'), false);
