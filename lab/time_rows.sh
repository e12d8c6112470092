#!/bin/bash
timeout 58 python lab/visit_rows.py time 2>&1 | grep -v Warn
