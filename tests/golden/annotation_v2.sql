BEGIN TRANSACTION;
CREATE TABLE annotator (
	id INTEGER NOT NULL, 
	name VARCHAR(100) NOT NULL, 
	folded VARCHAR(200) NOT NULL, 
	role VARCHAR(12) NOT NULL, 
	password TEXT, 
	active BOOLEAN NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (folded)
);
INSERT INTO "annotator" VALUES(1,'Ann','ann','admin',NULL,1,1000.0);
CREATE TABLE assignment (
	id VARCHAR(32) NOT NULL, 
	project INTEGER NOT NULL, 
	item INTEGER NOT NULL, 
	annotator INTEGER NOT NULL, 
	kind VARCHAR(12) NOT NULL, 
	shown_order VARCHAR(20) NOT NULL, 
	state VARCHAR(10) NOT NULL, 
	holds BOOLEAN NOT NULL, 
	number INTEGER NOT NULL, 
	vote_number INTEGER, 
	revision INTEGER NOT NULL, 
	repeats VARCHAR(32), 
	repeated BOOLEAN NOT NULL, 
	guideline_version INTEGER NOT NULL, 
	leased_at FLOAT NOT NULL, 
	expires_at FLOAT NOT NULL, 
	displayed_at FLOAT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(project) REFERENCES project (id), 
	FOREIGN KEY(item) REFERENCES item (id), 
	FOREIGN KEY(annotator) REFERENCES annotator (id), 
	FOREIGN KEY(repeats) REFERENCES assignment (id)
);
INSERT INTO "assignment" VALUES('uIWT-NMhkt3Lx1CrsqHuJg',1,4,1,'random','[1, 0]','voted',1,1,1,1,NULL,0,1,1000.0,1900.0,1000.0);
INSERT INTO "assignment" VALUES('9Ps_ytYTkqMq3_sbUa4w8A',1,2,1,'random','[0, 1]','voted',0,2,2,1,NULL,0,1,1001.0,1901.0,1001.0);
INSERT INTO "assignment" VALUES('ATNuhdWbNs_DCTVnBG2JZg',1,3,1,'random','[1, 0]','voted',1,3,3,2,NULL,0,1,1001.0,1901.0,1003.0);
INSERT INTO "assignment" VALUES('AQjwIVEL6FThmaq5bO7lVQ',1,1,1,'random','[0, 1]','leased',1,4,NULL,0,NULL,0,1,1002.0,1902.0,NULL);
CREATE TABLE blob (
	media VARCHAR(32) NOT NULL, 
	data BLOB NOT NULL, 
	PRIMARY KEY (media), 
	FOREIGN KEY(media) REFERENCES media ("key")
);
CREATE TABLE event (
	id INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	kind VARCHAR(20) NOT NULL, 
	project INTEGER, 
	annotator INTEGER, 
	assignment VARCHAR(32), 
	details TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "event" VALUES(1,1000.0,'guideline',1,NULL,NULL,'{"of": "written", "version": 1}');
INSERT INTO "event" VALUES(2,1000.0,'project',1,NULL,NULL,'{"of": "created"}');
INSERT INTO "event" VALUES(3,1000.0,'added',1,NULL,NULL,'{"added": 4, "faults": 0, "role": "ordinary"}');
INSERT INTO "event" VALUES(4,1000.0,'account',NULL,1,NULL,'{"of": "added", "role": "admin"}');
INSERT INTO "event" VALUES(5,1000.0,'leased',1,1,'uIWT-NMhkt3Lx1CrsqHuJg','{"item": 4, "of": "random"}');
INSERT INTO "event" VALUES(6,1000.0,'displayed',1,1,'uIWT-NMhkt3Lx1CrsqHuJg','{}');
INSERT INTO "event" VALUES(7,1001.0,'voted',1,1,'uIWT-NMhkt3Lx1CrsqHuJg','{"late": false, "revision": 1}');
INSERT INTO "event" VALUES(8,1001.0,'leased',1,1,'9Ps_ytYTkqMq3_sbUa4w8A','{"item": 2, "of": "random"}');
INSERT INTO "event" VALUES(9,1001.0,'leased',1,1,'ATNuhdWbNs_DCTVnBG2JZg','{"item": 3, "of": "random"}');
INSERT INTO "event" VALUES(10,1001.0,'displayed',1,1,'9Ps_ytYTkqMq3_sbUa4w8A','{}');
INSERT INTO "event" VALUES(11,1002.0,'voted',1,1,'9Ps_ytYTkqMq3_sbUa4w8A','{"late": false, "revision": 1}');
INSERT INTO "event" VALUES(12,1002.0,'leased',1,1,'AQjwIVEL6FThmaq5bO7lVQ','{"item": 1, "of": "random"}');
INSERT INTO "event" VALUES(13,1002.0,'prioritised',1,NULL,NULL,'{"items": 4}');
INSERT INTO "event" VALUES(14,1002.0,'displayed',1,1,'ATNuhdWbNs_DCTVnBG2JZg','{}');
INSERT INTO "event" VALUES(15,1003.0,'voted',1,1,'ATNuhdWbNs_DCTVnBG2JZg','{"late": false, "revision": 1}');
INSERT INTO "event" VALUES(16,1003.0,'reopened',1,1,'ATNuhdWbNs_DCTVnBG2JZg','{"revision": 1}');
INSERT INTO "event" VALUES(17,1003.0,'displayed',1,1,'ATNuhdWbNs_DCTVnBG2JZg','{}');
INSERT INTO "event" VALUES(18,1004.0,'voted',1,1,'ATNuhdWbNs_DCTVnBG2JZg','{"late": false, "revision": 2}');
CREATE TABLE guideline (
	project INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	text TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (project, version), 
	FOREIGN KEY(project) REFERENCES project (id)
);
INSERT INTO "guideline" VALUES(1,1,'',1000.0);
CREATE TABLE item (
	id INTEGER NOT NULL, 
	project INTEGER NOT NULL, 
	source INTEGER NOT NULL, 
	comparison TEXT NOT NULL, 
	content_hash VARCHAR(64) NOT NULL, 
	k INTEGER NOT NULL, 
	"row" TEXT NOT NULL, 
	role VARCHAR(12) NOT NULL, 
	answer TEXT, 
	explanation TEXT, 
	want INTEGER NOT NULL, 
	slots_left INTEGER NOT NULL, 
	priority FLOAT, 
	steered BOOLEAN DEFAULT 0 NOT NULL, 
	position BIGINT NOT NULL, 
	shuffle INTEGER NOT NULL, 
	freed BIGINT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (project, content_hash), 
	FOREIGN KEY(project) REFERENCES project (id), 
	FOREIGN KEY(source) REFERENCES source (id)
);
INSERT INTO "item" VALUES(1,1,1,'row-0','12598370197d4b6f13e5f20a255189caabb165959802856febfd5a3b7b4644aa',2,'{"id": "row-0", "prompt": {"text": "question 0", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "0a", "images": [], "messages": [], "tools": null}, {"text": "0b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}','ordinary',NULL,NULL,1,0,1.0,0,1798450446336,175427747,0);
INSERT INTO "item" VALUES(2,1,1,'row-1','243e8f7d458f3b9fc10915157815ef4497ce9debc922e39906b9b226d91b54b4',2,'{"id": "row-1", "prompt": {"text": "question 1", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "1a", "images": [], "messages": [], "tools": null}, {"text": "1b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}','ordinary',NULL,NULL,1,1,1.0,0,1633110982657,1109678976,1);
INSERT INTO "item" VALUES(3,1,1,'row-2','85fc8b82419bfde5c4b8fe4452f5f76d9155dbd78fa68b488d72cd00a003391f',2,'{"id": "row-2", "prompt": {"text": "question 2", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "2a", "images": [], "messages": [], "tools": null}, {"text": "2b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}','ordinary',NULL,NULL,1,0,1.0,0,1786354073602,924034959,0);
INSERT INTO "item" VALUES(4,1,1,'row-3','a4e6b1e703c87309a098b9a8e9fa93944feed0b84b622ccc46576d4292a523c6',2,'{"id": "row-3", "prompt": {"text": "question 3", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "3a", "images": [], "messages": [], "tools": null}, {"text": "3b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}','ordinary',NULL,NULL,1,0,1.0,0,1226716479491,655537486,0);
CREATE TABLE media (
	"key" VARCHAR(32) NOT NULL, 
	project INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	path TEXT, 
	mime VARCHAR(40) NOT NULL, 
	width INTEGER NOT NULL, 
	height INTEGER NOT NULL, 
	num_bytes BIGINT NOT NULL, 
	PRIMARY KEY ("key"), 
	UNIQUE (project, sha256), 
	FOREIGN KEY(project) REFERENCES project (id)
);
CREATE TABLE participation (
	project INTEGER NOT NULL, 
	annotator INTEGER NOT NULL, 
	cursor BIGINT NOT NULL, 
	freed_cursor BIGINT NOT NULL, 
	num_taken INTEGER NOT NULL, 
	num_votes INTEGER NOT NULL, 
	num_skips INTEGER NOT NULL, 
	calibration_taken INTEGER NOT NULL, 
	calibration_done INTEGER NOT NULL, 
	calibration_right INTEGER NOT NULL, 
	reopened VARCHAR(32), 
	guideline_read INTEGER, 
	started_at FLOAT NOT NULL, 
	PRIMARY KEY (project, annotator), 
	FOREIGN KEY(project) REFERENCES project (id), 
	FOREIGN KEY(annotator) REFERENCES annotator (id)
);
INSERT INTO "participation" VALUES(1,1,1798450446336,0,4,3,0,0,0,0,NULL,NULL,1000.0);
CREATE TABLE project (
	id INTEGER NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	kind VARCHAR(10) NOT NULL, 
	protocol TEXT NOT NULL, 
	guideline_version INTEGER NOT NULL, 
	is_open BOOLEAN NOT NULL, 
	salt VARCHAR(64) NOT NULL, 
	batches INTEGER NOT NULL, 
	freed BIGINT NOT NULL, 
	num_items INTEGER NOT NULL, 
	num_wanted INTEGER NOT NULL, 
	num_counted INTEGER NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "project" VALUES(1,'old','text','{"aspects": [], "calibration": 0, "choices": ["left", "right", "tie", "both_bad", "skip"], "flags": [], "gold_share": 0.0, "guideline": "", "lease_minutes": 15.0, "min_dwell_ms": 0, "order": "random", "overlap_share": 0.0, "overlap_votes": 3, "random_share": 0.0, "rationale": "optional", "repeat_gap": 20, "repeat_share": 0.0, "strength": false, "votes_per_item": 1}',1,1,'555443a544d525d93340487e1268b8c9',1,1,4,4,2,1000.0);
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(2,1.79534814653156042096e+09);
CREATE TABLE session (
	token VARCHAR(64) NOT NULL, 
	annotator INTEGER NOT NULL, 
	created_at FLOAT NOT NULL, 
	seen_at FLOAT NOT NULL, 
	expires_at FLOAT NOT NULL, 
	PRIMARY KEY (token), 
	FOREIGN KEY(annotator) REFERENCES annotator (id)
);
CREATE TABLE source (
	id INTEGER NOT NULL, 
	project INTEGER NOT NULL, 
	batch INTEGER NOT NULL, 
	description TEXT NOT NULL, 
	added_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(project) REFERENCES project (id)
);
INSERT INTO "source" VALUES(1,1,1,'',1000.0);
CREATE TABLE throttle (
	subject VARCHAR(64) NOT NULL, 
	failures INTEGER NOT NULL, 
	last_at FLOAT NOT NULL, 
	PRIMARY KEY (subject)
);
CREATE TABLE vote (
	id INTEGER NOT NULL, 
	assignment VARCHAR(32) NOT NULL, 
	revision INTEGER NOT NULL, 
	project INTEGER NOT NULL, 
	verdict TEXT NOT NULL, 
	shown TEXT NOT NULL, 
	late BOOLEAN NOT NULL, 
	surplus BOOLEAN NOT NULL, 
	dwell_ms INTEGER, 
	displayed_at FLOAT NOT NULL, 
	submitted_at FLOAT NOT NULL, 
	guideline_version INTEGER NOT NULL, 
	app_version VARCHAR(40) NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (assignment, revision), 
	FOREIGN KEY(assignment) REFERENCES assignment (id), 
	FOREIGN KEY(project) REFERENCES project (id)
);
INSERT INTO "vote" VALUES(1,'uIWT-NMhkt3Lx1CrsqHuJg',1,1,'{"aspects": {}, "choice": "b", "flags": {}, "ranks": null, "rationale": "", "strength": null}','{"aspects": {}, "choice": "left", "flags": {}, "ranks": null, "rationale": "", "strength": null}',0,0,NULL,1000.0,1001.0,1,'');
INSERT INTO "vote" VALUES(2,'9Ps_ytYTkqMq3_sbUa4w8A',1,1,'{"aspects": {}, "choice": "skip", "flags": {}, "ranks": null, "rationale": "", "strength": null}','{"aspects": {}, "choice": "skip", "flags": {}, "ranks": null, "rationale": "", "strength": null}',0,0,NULL,1001.0,1002.0,1,'');
INSERT INTO "vote" VALUES(3,'ATNuhdWbNs_DCTVnBG2JZg',1,1,'{"aspects": {}, "choice": "a", "flags": {}, "ranks": null, "rationale": "", "strength": null}','{"aspects": {}, "choice": "right", "flags": {}, "ranks": null, "rationale": "", "strength": null}',0,0,NULL,1002.0,1003.0,1,'');
INSERT INTO "vote" VALUES(4,'ATNuhdWbNs_DCTVnBG2JZg',2,1,'{"aspects": {}, "choice": "tie", "flags": {}, "ranks": null, "rationale": "", "strength": null}','{"aspects": {}, "choice": "tie", "flags": {}, "ranks": null, "rationale": "", "strength": null}',0,0,NULL,1003.0,1004.0,1,'');
CREATE INDEX ix_event_project ON event (project);
CREATE INDEX ix_session_annotator ON session (annotator);
CREATE INDEX item_freed ON item (project, freed) WHERE slots_left > 0;
CREATE INDEX item_prioritised ON item (project, priority) WHERE slots_left > 0 AND priority IS NOT NULL;
CREATE INDEX item_free ON item (project, position) WHERE slots_left > 0;
CREATE INDEX item_comparison ON item (project, comparison);
CREATE INDEX item_known ON item (project, role, shuffle) WHERE role <> 'ordinary';
CREATE UNIQUE INDEX assignment_once ON assignment (item, annotator) WHERE repeats IS NULL;
CREATE INDEX assignment_leased ON assignment (project, expires_at) WHERE state = 'leased';
CREATE UNIQUE INDEX assignment_mine ON assignment (project, annotator, number);
CREATE INDEX assignment_open ON assignment (annotator, project) WHERE state = 'leased';
CREATE INDEX assignment_voted ON assignment (project, annotator, vote_number);
CREATE UNIQUE INDEX assignment_repeat ON assignment (repeats);
CREATE INDEX vote_project ON vote (project, id);
CREATE TRIGGER vote_no_update BEFORE UPDATE ON vote BEGIN SELECT RAISE(ABORT, 'votes and events are append only'); END;
CREATE TRIGGER vote_no_delete BEFORE DELETE ON vote BEGIN SELECT RAISE(ABORT, 'votes and events are append only'); END;
CREATE TRIGGER event_no_update BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'votes and events are append only'); END;
CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'votes and events are append only'); END;
COMMIT;
