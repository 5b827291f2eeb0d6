{{- /* Milliseconds of a retention such as 12h, 30d or forever. */ -}}
{{- define "charter.retention" -}}
{{- $retention := .retention | default "forever" | toString -}}
{{- $units := dict "s" 1000 "m" 60000 "h" 3600000 "d" 86400000 -}}
{{- if eq $retention "forever" -}}
-1
{{- else if regexMatch "^[1-9][0-9]*[smhd]$" $retention -}}
{{- mul (int64 (regexFind "^[0-9]+" $retention)) (int64 (get $units (regexFind "[smhd]$" $retention))) -}}
{{- else -}}
{{- fail (printf "files/topics.yaml: topic %q: retention must read like 12h, 30d or forever, not %q" .topic $retention) -}}
{{- end -}}
{{- end -}}
