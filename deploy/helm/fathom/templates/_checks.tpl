{{- /* Whether there may be several servers at once, which is "true" or nothing. */}}
{{- define "fathom.isMany" -}}
{{- if .Values.autoscaling.enabled }}
{{- if gt (int .Values.autoscaling.maxReplicas) 1 }}true{{ end }}
{{- else if gt (int .Values.replicaCount) 1 }}true{{ end }}
{{- end }}

{{- /* What no schema can say: values that do not go together stop the rendering, in words. */}}
{{- define "fathom.checks" -}}
{{- $root := . }}
{{- $database := include "fathom.secret.isGiven" (dict "root" . "name" "database") }}
{{- if include "fathom.isMany" . }}
{{- if hasPrefix "sqlite" .Values.secrets.database.value }}
{{- fail "several replicas need PostgreSQL: secrets.database names SQLite, which one pod alone can use" }}
{{- end }}
{{- range $name := list "adminKey" "keysFile" }}
{{- if and (include "fathom.secret.isGiven" (dict "root" $root "name" $name)) (not $database) }}
{{- fail (printf "several replicas with secrets.%s need secrets.database: each would keep calibrations, keys and usage for itself" $name) }}
{{- end }}
{{- end }}
{{- with include "fathom.claimsOfOneNode" . }}
{{- fail (printf "several replicas cannot share a claim that one node alone can mount: set accessModes of persistence.%s" .) }}
{{- end }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" }}
{{- end }}
{{- $key := print $database (include "fathom.secret.isThere" (dict "root" . "name" "apiKey")) (include "fathom.secret.isGiven" (dict "root" . "name" "keysFile")) }}
{{- if not (or $key .Values.settings.insecure) }}
{{- fail "anybody could ask: give secrets.apiKey or secrets.keysFile, let secrets.apiKey.generate make one, keep keys in secrets.database, or say settings.insecure" }}
{{- end }}
{{- if and (gt (int .Values.gpu.count) 0) (eq "cpu" (.Values.settings.device | default "")) }}
{{- fail "gpu.count asks for a GPU, and settings.device says cpu" }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if hasPrefix "FATHOM_" .name }}
{{- fail (printf "extraEnv: %s goes to settings or secrets" .name) }}
{{- end }}
{{- end }}
{{- range .Values.extraArgs }}
{{- if regexMatch "^--(host|port|config|drain-timeout-s)(=|$)" . }}
{{- fail (printf "extraArgs: %s would go past probes and grace period, which the chart derives from settings" .) }}
{{- end }}
{{- end }}
{{- $mounts := list }}
{{- range .Values.extraVolumeMounts }}
{{- $mounts = append $mounts .mountPath }}
{{- end }}
{{- $settings := .Values.settings }}
{{- $paths := concat (list ($settings.model | default "") ($settings.adapter_root | default "") ($settings.data_root | default "")) (values ($settings.adapter | default dict)) }}
{{- range $name := list "models" "adapters" "data" }}
{{- $mount := include "fathom.mountPath" $name }}
{{- range $path := $paths }}
{{- if and (or (eq $path $mount) (hasPrefix (print $mount "/") $path)) (not (index $root.Values.persistence $name).enabled) (not $mounts) }}
{{- fail (printf "settings name %s, and nothing is mounted at %s: enable persistence.%s" $path $mount $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
